# SPDX-License-Identifier: MIT
"""Keeps pruned weights at zero while any torch optimizer trains, by hooks on the optimizer alone.

    before a step   the gradients of pruned weights become 0 (a closure's too), so moments stay 0
    after a step    pruned weights become +0.0, whatever the optimizer added to them
    at once, and after optimizer.load_state_dict
                    the optimizer's state of pruned weights becomes 0

The model has no hook and no wrapper. A hook sees only the parameters that its optimizer has at that
moment, never waits for the device, and writes in place, so that DistributedDataParallel's buckets
and captured graphs keep their memory. Before a step it also looks whether the model and the
optimizer still have the parameters that are kept: masks of other ones would keep nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lap_ext.errors import LapRuntimeError, LapTypeError, LapValueError, calling
from lap_ext.masks.targets import Target, is_plain, unwrapped, zero_
from lap_ext.ops import check


class KeepHandle:
    """The handle of `Masks.keep`; remove() or the end of a `with` block ends the keeping."""

    def __init__(self, model: Module, targets: Iterable[Target], optimizer: Optimizer) -> None:
        model = unwrapped(model)
        self._model = weakref.ref(model)
        paths = {id(module): path for path, module in model.named_modules()}
        self._layers = [_Layer(target, paths[id(target.owner)]) for target in targets]
        if self._layers and not self._members(optimizer):
            raise LapValueError(
                "the optimizer to train the masked layers",
                f"one that has none of the {len(self._layers)}",
                "Make it from the parameters of this model.",
            )
        self._clear(optimizer, loaded=False)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._clear),
        ]

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights now, not at the next step.

        Call it before `torch.nn.utils.clip_grad_norm_`, so that these gradients do not count in the
        norm.

        Raises:
            RuntimeError: as for `check`.
            TypeError: a gradient is sparse.
        """
        self.check()
        _mask_gradients(self._layers)

    def check(self) -> None:
        """Checks that the model still has the parameters that are kept, as each step does first.

        Raises:
            RuntimeError: a parameter was replaced or removed, so that its mask keeps nothing.
        """
        model = self._model()
        if model is not None:
            _check_current(model, self._layers)

    def zero_changed(self) -> None:
        """Zeroes the pruned weights of parameters that something has changed since this did it.

        Such as an optimizer without hooks, or model.load_state_dict.
        """
        for layer in self._layers:
            if layer.weight._version != layer.version:
                layer.zero_weight()

    def remove(self) -> None:
        """Removes the hooks; the optimizer then works as before and may move pruned weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> KeepHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _members(self, optimizer: Optimizer) -> list[_Layer]:
        """Lists the layers that the optimizer has now: groups may be added while training."""
        members = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        layers = [layer for layer in self._layers if id(layer.weight) in members]
        for layer in layers:
            layer.trained = True
        return layers

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layers = self._members(optimizer)
        self.check()
        _check_trained(self._layers, layers)
        _mask_gradients(layers)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": _masking(kwargs["closure"], layers)}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], _masking(args[1], layers), *args[2:]), kwargs
        return None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for layer in self._members(optimizer):
            layer.zero_weight()

    def _clear(self, optimizer: Optimizer, loaded: bool = True) -> None:
        """Zeroes the optimizer's state of pruned weights.

        In place, for captured graphs; loaded tensors are copied first, for torch shares them with
        the caller.
        """
        layers = self._members(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            _clear_history(optimizer, layers)
            return
        for layer in layers:
            state = optimizer.state.get(layer.weight, {})
            for key, value in state.items() if isinstance(state, MutableMapping) else ():
                if _is_per_weight(value, layer.weight):
                    state[key] = own = value.clone() if loaded else value
                    layer.zero_(own)


class _Layer:
    """A parameter and its mask, which follows it when the model moves to another device.

    Attributes:
        trained: whether the optimizer has, or once had, the parameter.
        version: how often it had been written when its pruned weights were zeroed.
    """

    def __init__(self, target: Target, path: str) -> None:
        self.name, self.weight, self.mask = target.name, target.weight, target.mask
        self.trained, self.version = False, -1
        self._path, self._attribute = path.split(".") if path else [], target.attribute

    def current(self, model: Module) -> Tensor | None:
        """Returns the model's parameter of this name, or None."""
        module: Module | None = model
        for name in self._path:
            module = None if module is None else module._modules.get(name)
        return None if module is None else module._parameters.get(self._attribute)

    def zero_weight(self) -> None:
        """Zeroes the pruned weights."""
        self.zero_(self.weight)
        self.version = self.weight._version

    def zero_(self, x: Tensor) -> None:
        """Zeroes the pruned elements of x, a tensor of the parameter's shape."""
        if self.mask.device != x.device:
            self.mask = self.mask.to(x.device)
        zero_(x, self.mask)


def check_hooks(optimizer: object) -> None:
    """Checks that an optimizer can have hooks.

    A wrapper may derive from Optimizer and yet have no hooks, if it was not initialized as an
    Optimizer.
    """
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise LapTypeError(
            "a torch.optim.Optimizer (with step hooks)",
            type(optimizer).__name__,
            "If this is a wrapper, pass the optimizer inside it.",
        )


_PRUNER = "A Pruner: make a new one and load this one's state_dict()."


@calling("Masks.keep")  # also where a hook calls it: that is how users know it
def _check_current(model: Module, layers: list[_Layer]) -> None:
    """Raises unless the model has the parameters, under their names or moved to new ones."""
    for layer in layers:
        current = layer.current(model)
        if current is layer.weight:
            continue
        # torch.nn.utils.prune and parametrizations rename a parameter: it is still there
        if current is None and any(layer.weight is p for p in model.parameters()):
            continue
        raise LapRuntimeError(
            "the model to have the parameter that is kept",
            f"{'none' if current is None else 'another one'} of that name",
            f"Call keep again with the optimizer of the model as it is now. {_PRUNER}",
            layer=layer.name,
        )


@calling("Masks.keep")
def _check_trained(layers: list[_Layer], members: list[_Layer]) -> None:
    """Raises where the optimizer has lost a layer that can still be trained, then by another."""
    left = {id(layer) for layer in members}
    for layer in layers:
        if layer.trained and layer.weight.requires_grad and id(layer) not in left:
            raise LapRuntimeError(
                "the optimizer to train the layers that it has trained",
                "one without this",
                "Call keep again after its groups have changed, once for each optimizer. "
                + _PRUNER,
                layer=layer.name,
            )


@calling("Masks.keep")
def _mask_gradients(layers: list[_Layer]) -> None:
    """Zeroes the gradients of pruned weights."""
    for layer in layers:
        grad = layer.weight.grad
        if grad is not None and not is_plain(grad):
            raise LapTypeError(
                "dense gradients",
                f"layout {grad.layout}",
                "An Embedding needs sparse=False.",
                layer=layer.name,
            )
    for layer in layers:
        grad = layer.weight.grad
        if grad is None:
            continue
        if check.may_overlap(grad.shape, grad.stride()):  # an expanded tensor cannot be written
            layer.weight.grad = grad = grad.detach().clone(memory_format=torch.contiguous_format)
        layer.zero_(grad)


def _masking(closure: Callable[[], Any], layers: list[_Layer]) -> Callable[[], Any]:
    """Wraps a closure to mask its gradients: no pruned weight moves within a step either."""

    def masked() -> Any:
        loss = closure()
        _mask_gradients(layers)
        return loss

    return masked


def _is_per_weight(value: Any, weight: Tensor) -> bool:
    """Whether an entry of the optimizer's state has one number per weight.

    Not the step count, which looks like the moment of a 0-dimensional parameter; not quantized
    states, whose zero is another number.
    """
    return (
        isinstance(value, Tensor)
        and value.shape == weight.shape
        and value.dim() > 0
        and (value.is_floating_point() or value.is_complex())
        and is_plain(value)
    )


def _clear_history(optimizer: torch.optim.LBFGS, layers: list[_Layer]) -> None:
    """Clears the history of LBFGS, vectors over all parameters, if it would move pruned weights.

    Such a history is of another function: the search starts anew. One that was collected under
    these masks stays, so that training can be resumed.
    """
    params = optimizer.param_groups[0]["params"]
    state = optimizer.state.get(params[0], {})
    vectors = [state.get("d"), state.get("prev_flat_grad")]
    vectors += [*(state.get("old_dirs") or ()), *(state.get("old_stps") or ())]
    kept = {id(p): torch.ones_like(p, dtype=torch.bool) for p in params}
    for layer in layers:
        kept[id(layer.weight)] = layer.mask.to(layer.weight.device)
    pruned = torch.cat([kept[id(p)].flatten() for p in params]).logical_not()
    for vector in vectors:
        if vector is not None and (vector.shape != pruned.shape or bool(vector[pruned].any())):
            optimizer.state.clear()
            return
