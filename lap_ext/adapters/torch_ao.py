# SPDX-License-Identifier: MIT
"""Prunes with torch.ao.pruning through a sparsifier that works with torch's own schedulers.

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

torch gives a sparsifier one tensor after the other, without the neighbors. Therefore `prepare`
traces the model once, and all masks of a step come from the same weights: `step` calls
`lap_ext.prune`, and `update_mask` writes the result. Exactly the requested number of weights is
kept, ties are broken as everywhere in lap_ext, and pruned weights never return, not even if a
scheduler lowers the sparsity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lap_ext
from lap_ext.criteria import CriterionLike
from lap_ext.errors import LapImportError, LapRuntimeError, LapValueError, calling
from lap_ext.options import (
    BatchNorm,
    Data,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Order,
    Residual,
    Scope,
)
from lap_ext.progress import Progress
from lap_ext.structures import NM, Block, Structure

with calling("lap_ext.adapters.torch_ao"):
    try:
        from torch.ao.pruning import BaseSparsifier, FakeSparsity  # type: ignore[attr-defined]
    except ImportError as error:
        raise LapImportError(
            "a torch with torch.ao.pruning",
            f"torch {torch.__version__} without it",
            "Use lap_ext.Pruner, which does not need it.",
            name="torch.ao.pruning",
        ) from error


_LISTED = 5  # of many layers, the first ones show how they are named


class LookaheadSparsifier(BaseSparsifier):
    """A sparsifier with lookahead scores, or any other criterion of lap_ext.

        sparsifier.prepare(model, config)   traces the model, puts a mask on each tensor of config
        sparsifier.step()                   new masks, to the sparsity_level of each tensor
        sparsifier.squash_mask()            a plain model again, pruned weights +0.0

    Only the tensors of config are pruned; all layers of the model count as neighbors.

    Args:
        example_inputs: as in `lap_ext.prune`.
        sparsity_level: the fraction of a tensor's weights to remove. A tensor's own
            "sparsity_level" in config takes precedence, and torch's schedulers change it.
        scope: "layer" ranks each tensor by itself; "global" ranks all tensors together and keeps as
            many weights as their levels keep in sum.
        topology: as in `lap_ext.prune`.
        sparse_block_shape: as in torch's WeightNormSparsifier: blocks of so many outputs by so many
            inputs are removed as a whole; (1, 1) is single weights.
        zeros_per_block: as there: how many weights of a block are removed; None means all. Fewer
            are possible in blocks of one output or one input, as N:M patterns: 2:4 is
            `sparsity_level=1, sparse_block_shape=(1, 4), zeros_per_block=2`. A pattern holds in all
            of a tensor or not at all, so that a level between 0 and 1 is an error then.
        criterion: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        order: as in `lap_ext.prune`.
        rounds: as in `lap_ext.prune`, for each step.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        data: as in `lap_ext.prune`; it is read at every step, so an iterator is not enough.
        neighbors: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        on_progress: as in `lap_ext.prune`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> sparsifier = LookaheadSparsifier(torch.ones(1, 4), criterion="magnitude")
        >>> sparsifier.prepare(net, [{"tensor_fqn": "0.weight", "sparsity_level": 0.75}])
        >>> sparsifier.step()
        >>> int(net[0].parametrizations.weight[0].mask.sum()), int((net[2].weight != 0).sum())
        (8, 16)
    """

    @calling("LookaheadSparsifier")
    def __init__(
        self,
        example_inputs: Inputs | None,
        sparsity_level: float = 0.5,
        scope: Scope = "layer",
        *,
        topology: lap_ext.Topology | None = None,
        sparse_block_shape: tuple[int, int] = (1, 1),
        zeros_per_block: int | None = None,
        criterion: CriterionLike = "lookahead",
        normalize: Normalize = "auto",
        order: Order = "parallel",
        rounds: int = 1,
        min_keep: MinKeep = None,
        batch_norm: BatchNorm = "edge",
        residual: Residual = "sum",
        data: Data | None = None,
        neighbors: Mapping[str, Any] | None = None,
        on_unsupported: OnUnsupported = "raise",
        on_progress: Callable[[Progress], Any] | None = None,
    ) -> None:
        super().__init__(defaults={"sparsity_level": sparsity_level})
        self._example = example_inputs
        self._tracing: dict[str, Any] = {
            "topology": topology,
            "neighbors": neighbors,
            "on_unsupported": on_unsupported,
        }
        self._options: dict[str, Any] = {
            "criterion": criterion,
            "structure": _structure(*sparse_block_shape, zeros_per_block),
            "scope": scope,
            "normalize": normalize,
            "order": order,
            "rounds": rounds,
            "min_keep": min_keep,
            "batch_norm": batch_norm,
            "residual": residual,
            "data": data,
            "on_progress": on_progress,
        }
        self._topology: lap_ext.Topology | None = None
        self._ranked: lap_ext.Masks | None = None  # within a step

    @calling("LookaheadSparsifier.prepare")
    def prepare(self, model: nn.Module, config: list[dict[str, Any]] | None) -> None:
        """Traces the model and puts a mask of ones on each tensor of config.

        Args:
            model: the model, which is changed as in torch: its tensors become parametrizations.
            config: dicts with "tensor_fqn", a parameter's full name, and optionally
                "sparsity_level". None means all layers of the model (in torch's own sparsifiers,
                all linear layers).

        Raises:
            TopologyError: the model cannot be traced.
            TypeError, ValueError: as in `lap_ext.prune`; also if a tensor is no layer of the model
                or is named twice. The model was not changed.
        """
        options = self._options | {"structure": None}
        pruner = lap_ext.Pruner(  # traces the model and checks all options but one
            model, self._example, lambda step: None, **self._tracing, **options
        )
        topology = pruner.topology
        parameters = [layer.parameter for layer in topology.layers.values()]
        if config is None:
            config = [{"tensor_fqn": name} for name in parameters]
        _check_config(config, model, parameters)
        names = {layer.parameter: name for name, layer in topology.layers.items()}
        layers = [names[group["tensor_fqn"]] for group in config]
        options = self._options | {"topology": topology, "layers": layers}
        if layers:
            lap_ext.Pruner(model, None, lambda step: None, **options)  # the structure fits
        self._topology = topology
        super().prepare(model, config)

    @calling("LookaheadSparsifier.step")
    def step(self, use_path: bool = True) -> None:
        """Makes new masks for all tensors from their current weights.

        Raises:
            ValueError: as in `lap_ext.prune`; no mask was changed.
            RuntimeError: `prepare` has not been called.
        """
        if not self.enable_mask_update:
            return
        self._ranked = self._rank()
        try:
            super().step(use_path)
        finally:
            self._ranked = None

    @calling("LookaheadSparsifier.update_mask")
    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Writes the mask of one tensor in place, so that the mask stays the same tensor.

        `step` calls this method. Outside of a step, a call ranks the whole model for this one mask.
        """
        masks = self._rank() if self._ranked is None else self._ranked
        name = self._names()[kwargs["tensor_fqn"]]
        mask = _mask_of(module, tensor_name)
        mask.copy_(masks[name])
        self.state[kwargs["tensor_fqn"]]["mask"] = mask  # a new tensor if the model has moved

    @calling("LookaheadSparsifier.load_state_dict")
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Continues where `state_dict` was called; call `prepare` with the same tensors first.

        torch's own method removes the masks from the dict that it is given and cannot save them
        again.

        Args:
            state_dict: what `state_dict` returned; it is not changed.
            strict: as in torch.

        Raises:
            RuntimeError: `prepare` has not been called.
        """
        self._traced()
        super().load_state_dict(copy.deepcopy(state_dict), strict)
        for group in self.groups:
            module, name = group["module"], group["tensor_name"]
            self.state[group["tensor_fqn"]]["mask"] = _mask_of(module, name)

    @calling("LookaheadSparsifier.squash_mask")
    def squash_mask(self, *args: Any, **kwargs: Any) -> None:
        """Makes the tensors plain parameters again, with pruned weights +0.0.

        torch's own method multiplies by the mask, which leaves -0.0, or NaN where a pruned weight
        is infinite.

        Args:
            args: torch's params_to_keep and params_to_keep_per_layer.
            kwargs: the same arguments by name.

        Raises:
            RuntimeError: `prepare` has not been called.
        """
        masks = self.masks
        super().squash_mask(*args, **kwargs)
        masks.apply(self._traced().model)

    @property
    def masks(self) -> lap_ext.Masks:
        """Copies of the current masks of the tensors of config: layer name -> mask."""
        names = self._names()
        copies = {
            names[group["tensor_fqn"]]: _mask_of(group["module"], group["tensor_name"]) != 0
            for group in self.groups
        }
        pruned = any(not bool(mask.all()) for mask in copies.values())
        return lap_ext.Masks(copies, self._options["structure"] if pruned else None)

    def _rank(self) -> lap_ext.Masks:
        """Returns the masks for the current levels of the groups."""
        topology, names = self._traced(), self._names()
        levels = {names[group["tensor_fqn"]]: group["sparsity_level"] for group in self.groups}
        masks, pattern = self.masks, isinstance(self._options["structure"], NM)
        if pattern:
            levels = {name: level for name, level in levels.items() if _is_full(name, level)}
        if not levels:
            return masks
        with _plain(self.groups):
            new = lap_ext.prune(
                topology.model,
                None,
                None if pattern else levels,
                topology=topology,
                layers=list(levels),
                masks=masks,
                apply=False,
                **self._options,
            ).masks
        return lap_ext.Masks({**masks, **new}, new.structure)

    def _traced(self) -> lap_ext.Topology:
        if self._topology is None:
            raise LapRuntimeError(
                "prepare(model, config) first (it traces the model)",
                "none",
                "A copy or an unpickled sparsifier needs it too.",
            )
        return self._topology

    def _names(self) -> dict[str, str]:
        """Maps full parameter names to layer names."""
        return {layer.parameter: name for name, layer in self._traced().layers.items()}


def _structure(rows: int, cols: int, zeros: int | None) -> Structure | None:
    """Returns what torch's sparse_block_shape and zeros_per_block describe."""
    block, every = Block(rows, cols), rows * cols
    if zeros is None or zeros == every:
        return None if every == 1 else block
    if min(rows, cols) > 1 or not 0 < zeros < every:
        raise LapValueError(
            f"zeros_per_block to be {every} in blocks of {block}, or at least 1 and fewer where "
            "they have one row or one column",
            zeros,
        )
    return NM(every - zeros, every, "in" if rows == 1 else "out")


def _is_full(name: str, level: float) -> bool:
    """Says whether a tensor gets a pattern, which it has everywhere or nowhere."""
    if level not in (0, 1):
        raise LapValueError(
            "a sparsity_level of 0 or 1 with zeros_per_block, which says how many weights are "
            "removed",
            level,
            layer=name,
        )
    return level == 1


def _check_config(config: list[dict[str, Any]], model: nn.Module, parameters: list[str]) -> None:
    """Checks that each tensor is a layer, named once, and not tied."""
    ids = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    more = ", ..." if len(parameters) > _LISTED else ""
    seen: set[str] = set()
    for group in config:
        name = group.get("tensor_fqn")
        if name not in parameters:
            raise LapValueError(
                "tensor_fqn to be the full name of a layer's parameter",
                repr(name),
                f"The layers are {', '.join(parameters[:_LISTED])}{more}.",
            )
        if given := sorted({"sparse_block_shape", "zeros_per_block"} & group.keys()):
            raise LapValueError(
                "one structure for all tensors", f"{given[0]} for {name!r}", "Give it once, above."
            )
        if name in seen:
            raise LapValueError("each tensor once", f"{name!r} again")
        if ids.count(id(model.get_parameter(name))) > 1:
            raise LapValueError(
                "tensors that are not tied (torch masks only one of the modules)",
                f"{name!r}, which is tied",
                "Leave it out of config.",
            )
        seen.add(name)


def _mask_of(module: nn.Module, tensor_name: str) -> Tensor:
    """Returns torch's own mask of a tensor, in the dtype of the weight."""
    steps: Any = module.parametrizations
    masking: Any = next(step for step in steps[tensor_name] if isinstance(step, FakeSparsity))
    mask: Tensor = masking.mask
    return mask


@contextmanager
def _plain(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Makes the tensors plain parameters again, and restores the parametrizations at the end.

    parametrize makes a class for each module and a property for each tensor: without the property,
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
