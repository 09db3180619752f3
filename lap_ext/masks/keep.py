# SPDX-License-Identifier: MIT
"""Keeps pruned weights at zero while any torch optimizer trains: no gradient, no moment, no write.

    in every backward   the gradients of pruned weights become 0, before they are added to .grad
    before a step       those that did not come from a backward too (and a closure's)
    after a step        pruned weights become +0.0, whatever the optimizer added to them
    at once, and after optimizer.load_state_dict
                        the optimizer's state of pruned weights becomes 0

A weight that is 0 and has neither gradient nor moments stays 0 under momentum, decay and SAM's
e(w) = rho * g / ||g||, whatever the optimizer's methods are called: torch's step hooks do not run
in first_step and second_step. An optimizer inside another one (SAM's base_optimizer) is kept too.

The modules have no hook and no wrapper; copies and pickles of the model do not get the hooks of its
parameters. The hooks on an optimizer see only the parameters that it has at that moment, and write
in place, so that DistributedDataParallel's buckets and captured graphs keep their memory. Before a
step they also look whether the model and the optimizer still have the parameters that are kept:
masks of other ones would keep nothing. They wait for the device only where something else has
written a kept parameter since the last step, to count the pruned weights that are no longer 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lap_ext.errors import LapRuntimeError, LapTypeError, LapValueError, calling, warn
from lap_ext.masks.targets import Target, owners, revived, revived_text, unwrapped, zero_
from lap_ext.ops import check
from lap_ext.ops.memory import is_plain


class KeepHandle:
    """The handle of `Masks.keep`; remove() or the end of a `with` block ends the keeping."""

    def __init__(
        self, model: Module, targets: Iterable[Target], optimizers: Iterable[Optimizer]
    ) -> None:
        model = unwrapped(model)
        self._model = weakref.ref(model)
        paths = {id(module): path for path, module in model.named_modules()}
        parameters = {id(x.weight): x for target in targets for x in owners(model, target)}
        self._layers = [_Layer(x, paths[id(x.owner)]) for x in parameters.values()]
        self.told = False  # whether the user has been warned of revived weights
        watched = _with_inner(optimizers)
        members = [self._members(x) for x in watched]
        if self._layers and not any(members):
            raise LapValueError(
                "the optimizer to train the masked layers",
                f"one that has none of the {len(self._layers)}",
                "Make it from the parameters of this model.",
            )
        self._hooks: list[Any] = []
        for optimizer in watched:
            self._clear(optimizer, loaded=False)
            self._hooks += [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
                optimizer.register_load_state_dict_post_hook(self._clear),
            ]
        for layer in self._layers:
            layer.zero_weight()
            layer.mask_gradient()

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights now: those that no backward has made.

        What backward adds to a gradient is masked there, and each step masks the rest first. Call
        this only where you write gradients yourself and read them before the step.

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
        """Zeroes the pruned weights of parameters that something else has written.

        Such as an optimizer without hooks, a method of its own, or model.load_state_dict. Call it
        once after each step of the optimizers.
        """
        self._restore([layer for layer in self._layers if layer.may_have_changed()])
        for layer in self._layers:
            layer.stepped = False

    def remove(self) -> None:
        """Removes the hooks; the optimizer then works as before and may move pruned weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for layer in self._layers:
            layer.unhook()

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
            layer.trainers.add(id(optimizer))
            layer.hook()
        return layers

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layers = self._members(optimizer)
        self.check()
        _check_trained(self._layers, layers, optimizer)
        self._restore([layer for layer in layers if layer.was_written()])
        _mask_gradients(layers)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": _masking(kwargs["closure"], layers)}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], _masking(args[1], layers), *args[2:]), kwargs
        return None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for layer in self._members(optimizer):
            layer.zero_weight()
            layer.stepped = True

    def _restore(self, layers: Sequence[_Layer]) -> None:
        """Zeroes the pruned weights of layers; warns the first time that some were not zero."""
        counts = [(layer.name, layer.zero_weight(counted=True)) for layer in layers]
        found = {name: count for name, count in counts if count}
        if found and not self.told:
            self.told = True
            warn(
                f"expected pruned weights to stay zero, got {revived_text(found)} that something "
                "else than the kept optimizers has written. They are zero again. Call "
                "masks.apply(model) after what writes weights (load_state_dict, an average), and "
                "keep every optimizer of the model."
            )

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
        trainers: ids of the optimizers that have, or once had, the parameter.
        stepped: whether one of them has stepped since `zero_changed` last looked.
        version: how often it had been written when its pruned weights were zeroed.
    """

    def __init__(self, target: Target, path: str) -> None:
        self.name, self.weight, self.mask = target.name, target.weight, target.mask
        self.trainers: set[int] = set()
        self.stepped, self.version = False, -1
        self._path, self._attribute = path.split(".") if path else [], target.attribute
        self._hook: Any = None

    def hook(self) -> None:
        """Masks what backward adds to the gradient, from now on; a frozen parameter has none."""
        if self._hook is None and self.weight.requires_grad:
            self._hook = self.weight.register_hook(_masked_by(weakref.ref(self)))

    def unhook(self) -> None:
        """Leaves gradients as they are again."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def current(self, model: Module) -> Tensor | None:
        """Returns the model's parameter of this name, or None."""
        module: Module | None = model
        for name in self._path:
            module = None if module is None else module._modules.get(name)
        return None if module is None else module._parameters.get(self._attribute)

    def was_written(self) -> bool:
        """Tells whether something has written the parameter since its pruned weights were zeroed.

        Not where the question cannot be asked: in a trace or a captured graph.
        """
        if torch.compiler.is_compiling():
            return False
        if self.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return self.weight._version != self.version

    def may_have_changed(self) -> bool:
        """Tells whether pruned weights may no longer be zero; torch counts no writes to .data."""
        unseen = bool(self.trainers) and self.weight.requires_grad and not self.stepped
        return unseen or self.was_written()

    def zero_weight(self, *, counted: bool = False) -> int:
        """Zeroes the pruned weights; returns how many were not zero, if they are counted."""
        count = revived(self.weight, self.mask) if counted else 0
        self.zero_(self.weight)
        self.version = self.weight._version
        return count

    def mask_gradient(self) -> None:
        """Zeroes the gradients of pruned weights, unless they are sparse."""
        grad = self.weight.grad
        if grad is None or not is_plain(grad):
            return
        if check.may_overlap(grad.shape, grad.stride()):  # an expanded tensor cannot be written
            self.weight.grad = grad = grad.detach().clone(memory_format=torch.contiguous_format)
        self.zero_(grad)

    def zero_(self, x: Tensor) -> None:
        """Zeroes the pruned elements of x, a tensor of the parameter's shape."""
        zero_(x, self.mask_on(x.device))

    def mask_on(self, device: torch.device) -> Tensor:
        """Returns the mask on a device, and stays there."""
        if self.mask.device != device:
            self.mask = self.mask.to(device)
        return self.mask


def _masked_by(kept: weakref.ref[_Layer]) -> Callable[[Tensor], Tensor | None]:
    """Makes the hook of a parameter, which ends with the layer: with its handle and optimizers."""

    def masked(gradient: Tensor) -> Tensor | None:
        layer = kept()
        if layer is None or gradient.layout != torch.strided:  # a step rejects sparse ones
            return None
        return torch.where(layer.mask_on(gradient.device), gradient, 0.0)

    return masked


def _with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Lists optimizers and those that they hold, which step for them without their hooks."""
    found = list(optimizers)
    for outer in found:  # it grows
        for value in vars(outer).values():
            held = value if isinstance(value, (list, tuple)) else [value]
            found += [x for x in held if has_hooks(x) and all(x is not y for y in found)]
    return found


def has_hooks(optimizer: object) -> bool:
    """Tells whether an object is an optimizer that can have hooks.

    A wrapper may derive from Optimizer and yet have no hooks, if it was not initialized as an
    Optimizer.
    """
    return isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")


def check_hooks(optimizer: object) -> None:
    """Checks that an optimizer can have hooks."""
    if not has_hooks(optimizer):
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
def _check_trained(layers: list[_Layer], members: list[_Layer], optimizer: Optimizer) -> None:
    """Raises where the optimizer has lost a layer that can still be trained, then by another."""
    left = {id(layer) for layer in members}
    for layer in layers:
        trained = id(optimizer) in layer.trainers and layer.weight.requires_grad
        if trained and id(layer) not in left:
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
        layer.mask_gradient()


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
