# SPDX-License-Identifier: MIT
"""Contexts that leave a model unchanged while it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lap_ext.computed import evaluating


@contextmanager
def same_random_state(model: nn.Module) -> Iterator[None]:
    """Restores the random state of the CPU and of the model's GPUs afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    indices = sorted(device.index for device in devices if device.index is not None)
    with torch.random.fork_rng(devices=indices):
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode; restores its mode, buffers and the random state."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with same_random_state(model), evaluating(model):
        try:
            yield
        finally:
            for module, name, buffer, before in buffers:
                _restore(module, name, buffer, before)


def _restore(module: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    """Restores a buffer that a forward has written to or replaced."""
    if module._buffers[name] is not buffer:
        module._buffers[name] = buffer
    if not torch.equal(buffer, before):
        with torch.no_grad():
            buffer.copy_(before)
