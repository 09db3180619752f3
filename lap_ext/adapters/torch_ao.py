# SPDX-License-Identifier: MIT
"""Lookahead pruning in torch.ao.pruning: a sparsifier, for torch's own schedulers.

    >>> import torch
    >>> from lap_ext.adapters.torch_ao import LookaheadSparsifier
    >>> from torch.ao.pruning import CubicSL
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> sparsifier = LookaheadSparsifier(torch.ones(1, 4), sparsity_level=0.75, scope="global")
    >>> sparsifier.prepare(net, config=None)  # None: all layers
    >>> scheduler = CubicSL(sparsifier, delta_t=1, total_t=3)
    >>> for epoch in range(4):  # train an epoch, then
    ...     sparsifier.step()
    ...     scheduler.step()
    >>> sparsifier.masks
    Masks(2 layers, 12 of 48 weights kept, sparsity 0.75)
    >>> sparsifier.squash_mask()
    >>> int(net[0].weight.count_nonzero() + net[2].weight.count_nonzero())
    12

A sparsifier of torch is shown one tensor after the other and not its neighbors, so that the model
is traced once, by `prepare`, and all masks of a step come from the same weights: `step` asks
`lap_ext.prune`, `update_mask` writes what it found. Exactly as many weights are kept as asked for,
ties as everywhere in lap_ext, and pruned weights never return, also where a scheduler goes back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lap_ext

try:
    from torch.ao.pruning import BaseSparsifier, FakeSparsity  # type: ignore[attr-defined]
except ImportError as error:
    raise ModuleNotFoundError(
        "lap_ext.adapters.torch_ao: expected a torch with torch.ao.pruning, got torch "
        f"{torch.__version__} without it. Use lap_ext.Pruner, which needs no host.",
        name="torch.ao.pruning",
    ) from error

_TRACE = ("kwargs", "neighbors", "unknown")  # the options of prune that are trace's
_OWN = ("sparsity", "masks", "apply", "exclude")  # those that the sparsifier decides


class LookaheadSparsifier(BaseSparsifier):
    """A sparsifier with lookahead scores, or any other criterion of lap_ext.

        sparsifier.prepare(model, config)   traces the model, puts a mask on each tensor of config
        sparsifier.step()                   new masks, to the sparsity_level of each tensor
        sparsifier.squash_mask()            a plain model again, pruned weights +0.0

    Only the tensors of config are pruned; their neighbors are all layers of the model.

    Args:
        example_inputs: as in `lap_ext.trace`, or a `lap_ext.Topology` of the model.
        sparsity_level: the fraction removed, of all weights of a tensor; a tensor's own
            "sparsity_level" in config comes first, and torch's schedulers change it.
        scope: "layer" ranks each tensor by itself; "global" all of them together, the sum of what
            their levels keep.
        options: criterion, normalize, order, rounds, bn, skip, data, kwargs, neighbors and unknown,
            as in `lap_ext.prune`.

    Raises:
        TypeError: an option that the sparsifier decides itself.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> sparsifier = LookaheadSparsifier(torch.ones(1, 4), criterion="magnitude")
        >>> sparsifier.prepare(net, [{"tensor_fqn": "0.weight", "sparsity_level": 0.75}])
        >>> sparsifier.step()
        >>> int(net[0].parametrizations.weight[0].mask.sum()), int((net[2].weight != 0).sum())
        (8, 16)
    """

    def __init__(
        self,
        example_inputs: Any,
        sparsity_level: float = 0.5,
        scope: str = "layer",
        **options: Any,
    ) -> None:
        for name in _OWN:
            if name in options:
                raise TypeError(
                    f"LookaheadSparsifier: expected no {name} (config says which tensors and how "
                    "much, masks carry over and are written), got one. Leave it out."
                )
        super().__init__(defaults={"sparsity_level": sparsity_level})
        self._example = example_inputs
        self._trace_options = {name: options.pop(name) for name in _TRACE if name in options}
        self._options = {"scope": scope, **options}
        self._topology: lap_ext.Topology | None = None
        self._found: lap_ext.Masks | None = None  # within a step

    def prepare(self, model: nn.Module, config: list[dict[str, Any]] | None) -> None:
        """Traces the model and puts a mask of ones on each tensor of config.

        Args:
            model: changed as torch does it: the tensors become parametrizations.
            config: dicts with "tensor_fqn", a parameter's full name, and perhaps "sparsity_level".
                None: all layers of the model (torch's own sparsifiers: its linear ones).

        Raises:
            TopologyError: the model cannot be traced.
            ValueError: a tensor is no layer of the model or is there twice; the model was not
                changed.
        """
        if isinstance(self._example, lap_ext.Topology):
            topology = self._example
        else:
            topology = lap_ext.trace(model, self._example, **self._trace_options)
        if topology.model is not model:
            raise ValueError(
                "LookaheadSparsifier.prepare: expected the topology of this model, got another's."
            )
        parameters = [layer.parameter for layer in topology.layers.values()]
        if config is None:
            config = [{"tensor_fqn": name} for name in parameters]
        _check_config(config, model, parameters)
        lap_ext.Pruner(
            model, topology, lambda step: None, **self._options
        )  # raises what step would
        self._topology = topology
        super().prepare(model, config)

    def step(self, use_path: bool = True) -> None:
        """New masks for all tensors, from the weights as they are now.

        Raises:
            ValueError: as `lap_ext.prune`; no mask was changed.
            RuntimeError: before `prepare`.
        """
        if not self.enable_mask_update:
            return
        self._found = self._ranked()
        try:
            super().step(use_path)
        finally:
            self._found = None

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Writes the mask of one tensor, in place: the mask's tensor stays the same one.

        `step` calls it. By itself it ranks the whole model for this one mask.
        """
        found = self._ranked() if self._found is None else self._found
        name = self._names()[kwargs["tensor_fqn"]]
        mask = _mask_of(module, tensor_name)
        mask.copy_(found[name])
        self.state[kwargs["tensor_fqn"]]["mask"] = mask  # another one since the model has moved

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Goes on where `state_dict` was called; after `prepare` of the same tensors.

        torch takes the masks out of the dict that it is given, and then has none to save again.

        Args:
            state_dict: what `state_dict` returned; it is not changed.
            strict: as torch has it.
        """
        self._traced()
        super().load_state_dict(copy.deepcopy(state_dict), strict)
        for group in self.groups:
            module, name = group["module"], group["tensor_name"]
            self.state[group["tensor_fqn"]]["mask"] = _mask_of(module, name)

    def squash_mask(self, *args: Any, **kwargs: Any) -> None:
        """Ends it: plain parameters again, pruned weights +0.0.

        torch multiplies, which leaves -0.0, and NaN where a pruned weight had become infinite.

        Args:
            args: torch's params_to_keep and params_to_keep_per_layer.
            kwargs: the same by name.
        """
        masks = self.masks
        super().squash_mask(*args, **kwargs)
        masks.apply(self._traced().model)

    @property
    def masks(self) -> lap_ext.Masks:
        """Layer name -> mask as it is now, of the tensors of config; copies."""
        names = self._names()
        return lap_ext.Masks(
            {
                names[group["tensor_fqn"]]: _mask_of(group["module"], group["tensor_name"]) != 0
                for group in self.groups
            }
        )

    def _ranked(self) -> lap_ext.Masks:
        """The masks to the levels that the groups have now."""
        topology, names = self._traced(), self._names()
        levels = {names[group["tensor_fqn"]]: group["sparsity_level"] for group in self.groups}
        others = [name for name in topology.layers if name not in levels]
        with _plain(self.groups):
            return lap_ext.prune(
                topology.model, topology, levels, masks=self.masks, exclude=others,
                apply=False, **self._options,
            ).masks  # fmt: skip

    def _traced(self) -> lap_ext.Topology:
        if self._topology is None:
            raise RuntimeError(
                "LookaheadSparsifier: expected prepare(model, config) first (it traces the model), "
                "got none. A copy or an unpickled sparsifier needs it too."
            )
        return self._topology

    def _names(self) -> dict[str, str]:
        """Full parameter name -> layer name."""
        return {layer.parameter: name for name, layer in self._traced().layers.items()}


def _check_config(config: list[dict[str, Any]], model: nn.Module, parameters: list[str]) -> None:
    """Each tensor is a layer, once, and used in one place."""
    function = "LookaheadSparsifier.prepare"
    places = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    seen: set[str] = set()
    for group in config:
        name = group.get("tensor_fqn")
        if name not in parameters:
            raise ValueError(
                f"{function}: expected tensor_fqn to be the full name of a layer's parameter, got "
                f"{name!r}. The layers are {', '.join(parameters[:5])}"
                f"{', ...' if len(parameters) > 5 else ''}."
            )
        if name in seen:
            raise ValueError(f"{function}: expected each tensor once, got {name!r} again.")
        if places.count(id(model.get_parameter(name))) > 1:
            raise ValueError(
                f"{function}: expected tensors that are used in one place (torch masks it there "
                f"alone), got {name!r}, which is tied. Leave it out of config."
            )
        seen.add(name)


def _mask_of(module: nn.Module, tensor_name: str) -> Tensor:
    """The mask that torch holds on a tensor, in the dtype of the weight."""
    steps: Any = module.parametrizations
    found: Any = next(step for step in steps[tensor_name] if isinstance(step, FakeSparsity))
    mask: Tensor = found.mask
    return mask


@contextmanager
def _plain(groups: list[dict[str, Any]]) -> Iterator[None]:
    """The tensors as the parameters that they were; puts the parametrizations back in the end.

    parametrize makes a class for each module and a property of each tensor: without the property,
    attribute access finds the parameter.
    """
    undo: list[tuple[Any, str, Any]] = []
    try:
        for group in groups:
            module, name = group["module"], group["tensor_name"]
            if parametrize.is_parametrized(module, name):
                kind = type(module)
                undo.append((module, name, vars(kind)[name]))
                delattr(kind, name)
                module._parameters[name] = module.parametrizations[name].original
        yield
    finally:
        for module, name, computed in undo:
            del module._parameters[name]
            setattr(type(module), name, computed)
