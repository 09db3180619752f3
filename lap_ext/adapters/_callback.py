# SPDX-License-Identifier: MIT
"""Keeps masks or prunes by a schedule during training, for the callbacks of all trainers.

The callback of each framework is a subclass named PruningCallback. It says when training begins
and ends, when the optimizer has stepped, where masks are stored, and with which inputs the model is
traced.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lap_ext
from lap_ext.allocation import Sparsity
from lap_ext.computed import references, value
from lap_ext.criteria import CriterionLike
from lap_ext.errors import LapTypeError, LapValueError, calling, warn
from lap_ext.masks import parameter_in, revived_text
from lap_ext.options import (
    BatchNorm,
    Cost,
    Data,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Residual,
    Scope,
    listed,
)
from lap_ext.progress import Progress
from lap_ext.structures import Aggregate, StructureLike

_AVERAGE = "_average_model"  # the attribute of Lightning's own callbacks


class TrainingCallback(ABC):
    """Keeps masks, or prunes by a schedule; the subclasses document arguments and attributes."""

    @calling("PruningCallback")
    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        *,
        schedule: Callable[[int], Sparsity | None] | None = None,
        example_inputs: Inputs | None = None,
        topology: lap_ext.Topology | None = None,
        criterion: CriterionLike = "lookahead",
        structure: StructureLike | None = None,
        aggregate: Aggregate = "energy",
        multiple_of: int = 1,
        strict: bool = False,
        cost: Cost | None = None,
        uniform: bool = False,
        scope: Scope = "layer",
        normalize: Normalize = "auto",
        order: Order = "parallel",
        rounds: int = 1,
        layers: Patterns | None = None,
        exclude: Patterns = (),
        min_keep: MinKeep = None,
        batch_norm: BatchNorm = "edge",
        residual: Residual = "sum",
        data: Data | None = None,
        neighbors: Mapping[str, Any] | None = None,
        on_unsupported: OnUnsupported = "raise",
        on_progress: Callable[[Progress], Any] | None = None,
    ) -> None:
        super().__init__()
        self._example, self._topology = example_inputs, topology
        self._tracing: dict[str, Any] = {"neighbors": neighbors, "on_unsupported": on_unsupported}
        self._options: dict[str, Any] = {
            "criterion": criterion,
            "structure": structure,
            "aggregate": aggregate,
            "multiple_of": multiple_of,
            "strict": strict,
            "cost": cost,
            "uniform": uniform,
            "scope": scope,
            "normalize": normalize,
            "order": order,
            "rounds": rounds,
            "layers": _reusable(layers),
            "exclude": _reusable(exclude),
            "min_keep": min_keep,
            "batch_norm": batch_norm,
            "residual": residual,
            "data": data,
            "on_progress": on_progress,
        }
        if (masks is None) == (schedule is None):
            raise LapTypeError(
                "either masks (kept as they are) or schedule (step -> sparsity)",
                "neither" if masks is None else "both",
                "To prune before training call lap_ext.prune and pass result.masks.",
            )
        if masks is not None:
            inputs = {"example_inputs": example_inputs, "topology": topology}
            _check_defaults({**self._options, **self._tracing, **inputs})
        self.masks = lap_ext.Masks({} if masks is None else masks)
        self.result: lap_ext.PruneResult | None = None
        self._schedule = schedule
        self._pruner: lap_ext.Pruner | None = None
        self._hooks: list[Any] = []  # each with remove()

    def __repr__(self) -> str:
        schedule = "" if self._schedule is None else f", schedule={self._schedule!r}"
        return f"PruningCallback({self.masks!r}{schedule})"

    @property
    def sparsity(self) -> float:
        """The fraction of the pruned layers' weights that has been removed so far."""
        return self.masks.sparsity

    @abstractmethod
    def _inputs(self, model: Any) -> Inputs:
        """Returns what to trace a model with: example_inputs, or the framework's own example."""

    @calling("PruningCallback")
    def _begin(
        self, model: nn.Module, optimizers: Sequence[Any], wrapped: nn.Module | None = None
    ) -> None:
        """Keeps the masks, or builds the pruner.

        Args:
            model: the user's own module.
            optimizers: all optimizers of the training, each with torch's own hooks.
            wrapped: what DistributedDataParallel made of the model; None: it is not wrapped.
        """
        if self._schedule is None:
            weights = weights_of(model, self.masks)
            self.masks = _on_device(self.masks, weights)
            self._hooks.append(self.masks.keep(model, _training(optimizers, weights.values())))
        else:
            inputs = self._inputs(model) if self._topology is None else self._example
            self._pruner = self._build(model if wrapped is None else wrapped, optimizers, inputs)
            self._hooks.append(self._pruner)

    def _apply(self, model: nn.Module) -> None:
        """Sets the pruned weights of a model, or of an average of it, to zero where it is now."""
        _on_device(self.masks, weights_of(_averaged(model), self.masks)).apply(model)

    def _mask_averages(self, callbacks: Iterable[Any]) -> None:
        """Masks the averages of the weights that other callbacks hold: they then stay zero."""
        for callback in callbacks:
            for name, held in getattr(callback, "__dict__", {}).items():
                known = isinstance(held, AveragedModel) or name == _AVERAGE
                if known and isinstance(held, nn.Module):
                    weights = weights_of(_averaged(held), self.masks)
                    if len(weights) == len(self.masks):  # an average of the whole model
                        _check_average(held, weights)
                        self._apply(held)

    def _finish(self, model: nn.Module) -> None:
        """Zeroes, after all other callbacks, what one of them has brought back at the end."""
        found = self.masks.check(model)
        if found:
            self._apply(model)
            warn(
                f"expected pruned weights to stay zero to the end of training, got "
                f"{revived_text(found)} that another callback has written (an average of the "
                "weights?). They are zero again. Apply the masks to the average as well: "
                "callback.masks.apply(average) after each pruning."
            )

    def _take(self) -> None:
        """Publishes the pruner's masks and result."""
        assert self._pruner is not None
        self.masks, self.result = self._pruner.masks, self._pruner.result

    def _end(self) -> None:
        """Ends the keeping or the pruning."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._pruner = None

    def _build(
        self, model: nn.Module, optimizers: Sequence[Any], inputs: Inputs | None
    ) -> lap_ext.Pruner:
        assert self._schedule is not None
        pruner = lap_ext.Pruner(  # traces the model and checks all options
            model, inputs, self._schedule, topology=self._topology, **self._tracing, **self._options
        )
        chosen = _training(optimizers, [layer.weight for layer in pruner.layers])
        return lap_ext.Pruner(
            model,
            None,
            self._schedule,
            optimizer=chosen,
            topology=pruner.topology,
            **self._options,
        )


def _reusable(patterns: Patterns | None) -> Patterns | None:
    """Patterns for two pruners: a generator ends after the first."""
    return None if patterns is None else listed(patterns)


def _averaged(model: nn.Module) -> nn.Module:
    """Returns the average within torch's AveragedModel, under the model's own names."""
    return model.module if isinstance(model, AveragedModel) else model


def _check_average(held: nn.Module, names: Iterable[str]) -> None:
    """Raises for an average of buffers, where masks of computed weights are among them."""
    computed = references(_averaged(held))
    found = [name for name in names if parameter_in(name, computed) is not None]
    if found and getattr(held, "use_buffers", False):
        raise LapValueError(
            "an average of parameters alone (use_buffers=False)",
            f"one of buffers too, such as the mask of {found[0]!r}, which its module computes",
            "Make its weight permanent (torch.nn.utils.parametrize.remove_parametrizations).",
        )


def check_pruned(model: nn.Module, masks: Mapping[str, Tensor], source: str, cure: str) -> None:
    """Checks that masks belong to the model's current weights: all that they prune are zero."""
    for name, weight in weights_of(model, masks).items():
        if bool(weight.detach()[~masks[name].to(weight.device)].any()):
            raise LapValueError(
                "the masks of the checkpoint that was loaded (its pruned weights are zero)",
                f"{source}, which prunes weights of {name!r} that are not",
                cure,
            )


def weights_of(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps the names of masks to the weights that the model itself has, or computes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    computed = references(model)
    weights: dict[str, Tensor] = {}
    for layer in masks:
        name = parameter_in(layer, {**parameters, **computed})
        if name is not None:
            weights[layer] = parameters[name] if name in parameters else value(*computed[name])
    return weights


def on_device(inputs: Any, device: torch.device) -> Any:
    """Moves the tensors of inputs to a device, also inside tuples, lists and mappings."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: on_device(x, device) for name, x in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(on_device(x, device) for x in inputs)
    return inputs


def _check_defaults(options: Mapping[str, Any]) -> None:
    """Checks that no option is given beside masks."""
    parameters = inspect.signature(TrainingCallback).parameters
    given = []
    for name, given_value in options.items():
        default = parameters[name].default
        if given_value is not None and (default is None or given_value != default):
            given.append(name)
    if given:
        raise LapTypeError(
            "masks alone (nothing is scored)", f"{', '.join(given)} too", "Leave them out."
        )


def _training(optimizers: Sequence[Any], weights: Iterable[Tensor]) -> list[Any]:
    """Returns the optimizers that train one of the weights; all if none does, to be rejected."""
    ids = {id(weight) for weight in weights}
    chosen = [
        optimizer
        for optimizer in optimizers
        if any(id(p) in ids for group in optimizer.param_groups for p in group["params"])
    ]
    return chosen or list(optimizers)


def _on_device(masks: lap_ext.Masks, weights: Mapping[str, Tensor]) -> lap_ext.Masks:
    """Moves each mask to the device of its parameter."""
    devices = {
        name: weights[name].device if name in weights else mask.device
        for name, mask in masks.items()
    }
    placed = {name: mask.to(devices[name]) for name, mask in masks.items()}
    return lap_ext.Masks(placed, masks.structure)
