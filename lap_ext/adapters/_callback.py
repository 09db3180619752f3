# SPDX-License-Identifier: MIT
"""What the callbacks of trainers share: masks that are kept, or a schedule, from first step to last.

A host's callback says when training begins, when the optimizer has stepped and when it ends, and
where masks are stored; it is called PruningCallback, as the messages here name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.masks import parameter_in


class TrainingCallback:
    """Exactly one of masks and schedule; the arguments and attributes are the host's callback's."""

    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        *,
        schedule: Any = None,
        example_inputs: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if (masks is None) == (schedule is None):
            given = "neither" if masks is None else "both"
            raise TypeError(
                "PruningCallback: expected either masks (kept as they are) or schedule (step -> "
                f"sparsity), got {given}. To prune before training call lap_ext.prune and pass "
                "result.masks."
            )
        if masks is not None and (options or example_inputs is not None):
            names = [*options] + ["example_inputs"] * (example_inputs is not None)
            raise TypeError(
                f"PruningCallback: expected masks alone (nothing is scored), got {', '.join(names)} "
                "too. Leave them out."
            )
        self.masks = lap_ext.Masks({} if masks is None else masks)
        self.result: lap_ext.PruneResult | None = None
        self._schedule = schedule
        self._example = example_inputs
        self._options = options
        self._pruner: lap_ext.Pruner | None = None
        self._hooks: list[Any] = []  # each with remove()

    def __repr__(self) -> str:
        schedule = "" if self._schedule is None else f", schedule={self._schedule!r}"
        return f"PruningCallback({self.masks!r}{schedule})"

    @property
    def sparsity(self) -> float:
        """Fraction removed so far of the weights of the pruned layers."""
        return self.masks.sparsity

    def _begin(
        self, model: nn.Module, optimizers: Sequence[Any], inputs: Any, options: Mapping[str, Any]
    ) -> None:
        """Keeps the masks, or builds what prunes; gradients of pruned weights are 0 from now on.

        Args:
            model: what is trained; for a schedule also what DistributedDataParallel made of it.
            optimizers: all of the training, each with torch's own hooks.
            inputs: for a schedule's trace, as `placed` has them.
            options: of `lap_ext.Pruner`.
        """
        if self._schedule is None:
            weights = weights_of(model, self.masks)
            self.masks = _on_device(self.masks, weights)
            for optimizer in _trainers(optimizers, weights.values()):
                self._hooks.append(self.masks.keep(model, optimizer))
        else:
            self._pruner = self._built(model, optimizers, inputs, options)
            self._hooks.append(self._pruner)
            layers = self._pruner.topology.layers
            weights = {name: layer.weight for name, layer in layers.items()}
        for name, weight in weights.items():
            if weight.requires_grad:
                self._hooks.append(weight.register_hook(self._masking(name)))

    def _take(self) -> None:
        """What the pruner has now is what everybody sees."""
        assert self._pruner is not None
        self.masks, self.result = self._pruner.masks, self._pruner.result

    def _end(self) -> None:
        """Nothing of ours is left on the optimizers and the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._pruner = None

    def _masking(self, name: str) -> Any:
        """A hook that zeroes the gradient of pruned weights: before processes average it, and clip."""

        def masked(gradient: Tensor) -> Tensor:
            mask = self.masks.get(name)
            if mask is None or gradient.layout != torch.strided:  # Masks.keep refuses sparse ones
                return gradient
            return torch.where(mask, gradient, 0.0)

        return masked

    def _built(
        self, model: nn.Module, optimizers: Sequence[Any], inputs: Any, options: Mapping[str, Any]
    ) -> lap_ext.Pruner:
        pruner = lap_ext.Pruner(model, inputs, self._schedule, **options)  # traces, and checks all
        weights = [layer.weight for layer in pruner.layers]
        chosen = _trainers(optimizers, weights)
        return lap_ext.Pruner(model, pruner.topology, self._schedule, optimizer=chosen, **options)


def check_pruned(model: nn.Module, masks: Mapping[str, Tensor], source: str, cure: str) -> None:
    """The masks are those of the weights that the model has now: what they prune is zero."""
    for name, weight in weights_of(model, masks).items():
        if bool(weight.detach()[~masks[name].to(weight.device)].any()):
            raise ValueError(
                "PruningCallback: expected the masks of the checkpoint that was loaded (its pruned "
                f"weights are zero), got {source}, which prunes weights of {name!r} that are not. "
                f"{cure}"
            )


def weights_of(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mask name -> its parameter, for names as the model itself has them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for layer in masks:
        name = parameter_in(layer, parameters)
        if name is not None:
            found[layer] = parameters[name]
    return found


def _trainers(optimizers: Sequence[Any], weights: Iterable[Tensor]) -> list[Any]:
    """The optimizers that train one of the weights; all of them if none does, to be refused."""
    wanted = {id(weight) for weight in weights}
    found = [
        optimizer
        for optimizer in optimizers
        if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
    ]
    return found or list(optimizers)


def _on_device(masks: lap_ext.Masks, weights: Mapping[str, Tensor]) -> lap_ext.Masks:
    """Each mask where its parameter is."""
    on = {name: weights[name].device if name in weights else x.device for name, x in masks.items()}
    return lap_ext.Masks({name: mask.to(on[name]) for name, mask in masks.items()})


def placed(
    example: Any, model: nn.Module, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(inputs, options) as `lap_ext.trace` takes them: on the model's device, named ones in kwargs."""
    inputs, options = _moved(example, next(model.parameters()).device), dict(options)
    if isinstance(inputs, Mapping):
        options["kwargs"] = {**inputs, **options.get("kwargs", {})}
        inputs = ()
    return inputs, options


def _moved(inputs: Any, device: torch.device) -> Any:
    """Tensors, in tuples and mappings, on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: _moved(x, device) for name, x in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_moved(x, device) for x in inputs)
    return inputs
