# SPDX-License-Identifier: MIT
"""Multiplies a tensor that a module computes itself by a mask, each time that it is computed.

    parametrization   `Masked` is the last step of the tensor's parametrizations
    hook              `MaskHook` runs after the hook that computes the tensor

The mask is a buffer, so that it is saved with the model's state and moves with the model: a model
without it does not load that state. Pruned weights are +0.0 whatever the parameters are, and they
send no gradient to these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Masked(nn.Module):
    """The last step of a parametrization: keeps the entries where mask is True.

    Example:
        >>> Masked(torch.tensor([True, False]))(torch.tensor([2.0, torch.nan]))
        tensor([2., 0.])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, and +0.0 where it is pruned, even where x is NaN."""
        return torch.where(self.mask, x, 0.0)

    def right_inverse(self, x: Tensor) -> Tensor:
        """Lets a new value be assigned to the tensor as before."""
        return x


class MaskHook:
    """Masks a tensor that a hook before it has computed."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Masks the tensor in the module, before its forward."""
        if self.attribute in module._parameters:
            settle(module)
            return
        made: Tensor = getattr(module, self.attribute)
        setattr(module, self.attribute, masked(module, self.attribute, made))


def settle(module: nn.Module) -> None:
    """Prunes tensors that are parameters again, as remove_weight_norm leaves them.

    Their masks are then no longer needed, and are taken off.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, MaskHook) and hook.attribute in module._parameters:
            weight = module.get_parameter(hook.attribute).detach()
            weight.copy_(masked(module, hook.attribute, weight))
            del module._forward_pre_hooks[key], module._buffers[mask_buffer(hook.attribute)]


def masked(module: nn.Module, attribute: str, x: Tensor) -> Tensor:
    """Applies the mask of a tensor that a hook computes, where it has one."""
    mask = module._buffers.get(mask_buffer(attribute))
    return x if mask is None else torch.where(mask, x, 0.0)


def mask_of(module: nn.Module, attribute: str) -> Tensor | None:
    """Returns the mask on a computed tensor; None where it has none."""
    if parametrize.is_parametrized(module, attribute):
        steps: Any = module.parametrizations
        return next((x.mask for x in steps[attribute] if isinstance(x, Masked)), None)
    return module._buffers.get(mask_buffer(attribute))


def keep_only(module: nn.Module, attribute: str, mask: Tensor) -> None:
    """Prunes a computed tensor: it is +0.0 from now on where mask, or an earlier one, is False."""
    earlier = mask_of(module, attribute)
    if earlier is not None:
        earlier.logical_and_(mask.to(earlier.device))
        return
    own = mask.clone(memory_format=torch.contiguous_format)
    if parametrize.is_parametrized(module, attribute):
        steps: Any = module.parametrizations
        steps[attribute].append(Masked(own).train(module.training))
        return
    module.register_buffer(mask_buffer(attribute), own)
    module.register_forward_pre_hook(MaskHook(attribute))
    with torch.no_grad():
        setattr(module, attribute, masked(module, attribute, getattr(module, attribute).detach()))


def mask_buffer(attribute: str) -> str:
    """Names the buffer that holds the mask of what a hook computes."""
    return f"{attribute}_kept"
