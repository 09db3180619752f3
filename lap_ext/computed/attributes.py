# SPDX-License-Identifier: MIT
"""Finds, reads and replaces tensors that a module computes itself and then reads as an attribute.

    parametrization   torch.nn.utils.parametrize, and all that is built on it (weight_norm,
                      spectral_norm and orthogonal of torch.nn.utils.parametrizations, LoRA
                      parametrizations, FakeSparsity): computed whenever the attribute is read
    hook              the older torch.nn.utils.weight_norm and spectral_norm: computed by a hook
                      before each forward

torch.nn.utils.prune is not among them: its weight is a parameter times a mask.

A computed tensor is always computed as in evaluation mode, so that reading it changes nothing: in
training mode, spectral norms write their estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lap_ext.computed.masking import MaskHook, keep_only, mask_buffer, mask_of, masked, settle


class Reference(NamedTuple):
    """A computed tensor: the module that computes it, and its attribute there."""

    module: nn.Module
    attribute: str


def is_computed(module: nn.Module, attribute: str) -> bool:
    """Tells whether a module computes this tensor itself."""
    return attribute in _attributes(module)


def references(model: nn.Module) -> dict[str, Reference]:
    """Maps the names of all computed tensors to where they are; a shared module has all names."""
    return {
        f"{path}.{attribute}" if path else attribute: Reference(module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute in _attributes(module)
    }


def sources(model: nn.Module) -> set[str]:
    """Names the parameters that computed tensors are computed from."""
    names = set()
    for name, (module, attribute) in references(model).items():
        hook, path = _hooks(module).get(attribute), name.removesuffix(attribute)
        if hook is None:
            steps: Any = module.parametrizations
            inner = f"{path}parametrizations.{attribute}."
            names |= {inner + x for x, _ in steps[attribute].named_parameters()}
        elif isinstance(hook, SpectralNorm):
            names.add(f"{name}_orig")
        else:
            names |= {f"{name}_g", f"{name}_v"}
    return names


def value(module: nn.Module, attribute: str) -> Tensor:
    """Computes the tensor from the module's present parameters, without gradients."""
    with torch.no_grad(), evaluating(module._modules.get("parametrizations")):
        hook = _hooks(module).get(attribute)
        if hook is None:
            computed: Tensor = getattr(module, attribute)
            return computed.detach()
        made: Any = (
            hook.compute_weight(module, do_power_iteration=False)
            if isinstance(hook, SpectralNorm)
            else hook.compute_weight(module)
        )
        return masked(module, attribute, made.detach())


def reserve_masks(model: nn.Module) -> None:
    """Registers masks that keep everything on the computed weights of a model that have none.

    So it loads the state of the same model with any masks.
    """
    for module, attribute in references(model).values():
        tensor = value(module, attribute)
        if tensor.dim() > 1 and mask_of(module, attribute) is None:
            keep_only(module, attribute, torch.ones_like(tensor, dtype=torch.bool))


def value_of(model: nn.Module, name: str) -> Tensor:
    """Returns a parameter, a buffer or a computed tensor by its name."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    for store in (module._parameters, module._buffers):
        tensor = store.get(attribute)
        if tensor is not None:
            return tensor
    return value(module, attribute)


@contextmanager
def as_parameters(model: nn.Module, requires_grad: bool = False) -> Iterator[None]:
    """Puts parameters in the place of all computed tensors, for a while.

    The model then computes what it did, from plain weights. Afterwards everything is as it was.
    """
    with ExitStack() as undo:
        for module in list(model.modules()):
            settle(module)
            values = {name: value(module, name) for name in _attributes(module)}
            if values:
                undo.callback(_restore, module, type(module), *_state(module))
                _replace(module, values, requires_grad)
        yield


def _attributes(module: nn.Module) -> list[str]:
    """Lists the tensors that a module computes itself."""
    steps: Any = module._modules.get("parametrizations")
    parametrized = list(steps) if steps is not None and parametrize.is_parametrized(module) else []
    return [*parametrized, *_hooks(module)]


def _hooks(module: nn.Module) -> dict[str, WeightNorm | SpectralNorm]:
    """Maps the tensors that hooks compute to these hooks."""
    hooks = module._forward_pre_hooks.values()
    return {hook.name: hook for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Puts a module into evaluation mode; afterwards every training flag in it is as it was."""
    modes = {} if model is None else {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _state(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Copies what `_replace` changes."""
    stores: list[dict[Any, Any]] = [module._parameters, module._buffers, module._modules]
    stores += [module._forward_pre_hooks, module.__dict__]
    return tuple(dict(store) for store in stores)


def _restore(module: nn.Module, kind: type[nn.Module], *state: dict[str, Any]) -> None:
    module.__class__ = kind
    *entries_of, attributes = state
    stores: Any = (module._parameters, module._buffers, module._modules, module._forward_pre_hooks)
    for store, entries in zip(stores, entries_of, strict=True):
        store.clear()
        store.update(entries)
    module.__dict__.update(attributes)


def _replace(module: nn.Module, values: dict[str, Tensor], requires_grad: bool) -> None:
    """Makes computed tensors parameters, and takes off what computes them."""
    if module._modules.pop("parametrizations", None) is not None:
        module.__class__ = type(module).__bases__[0]  # as remove_parametrizations does
    own = (WeightNorm, SpectralNorm, MaskHook)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, own):
            del module._forward_pre_hooks[key]
    for name, tensor in values.items():
        module.__dict__.pop(name, None)  # what a hook has left
        module._buffers.pop(mask_buffer(name), None)
        module._parameters[name] = nn.Parameter(tensor, requires_grad=requires_grad)
