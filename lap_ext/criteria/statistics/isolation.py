# SPDX-License-Identifier: MIT
"""Leaving things as they were: what is measured on a model changes nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def same_random_state(model: nn.Module) -> Iterator[None]:
    """What is drawn inside (by the model, by a data loader) is not drawn outside."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    places = sorted(device.index for device in devices if device.index is not None)
    with torch.random.fork_rng(devices=places):
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags, buffers and random state as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with same_random_state(model):
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for module, name, buffer, before in buffers:
                _restore(module, name, buffer, before)


def _restore(module: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    """A buffer that a forward has written to, or has replaced."""
    if module._buffers[name] is not buffer:
        module._buffers[name] = buffer
    if not torch.equal(buffer, before):
        with torch.no_grad():
            buffer.copy_(before)
