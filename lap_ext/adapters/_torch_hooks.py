# SPDX-License-Identifier: MIT
"""Takes the hooks of torch.nn.utils.prune off a model for a while, and reads their masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import prune

import lap_ext

Hooks: TypeAlias = list[tuple[nn.Module, Any]]  # modules and torch's pruning hooks on them


@contextmanager
def plain(model: nn.Module) -> Iterator[Hooks]:
    """Makes all weights plain parameters, also those that torch has pruned.

    Yields the hooks of torch's pruning, each with its module; restores everything at the end.
    """
    hooks: Hooks = [
        (module, hook)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    undo = []
    try:
        for module, hook in hooks:
            name = hook._tensor_name
            parameters, calls = module._parameters, module._forward_pre_hooks
            undo.append((module, name, module.__dict__.pop(name), dict(parameters), dict(calls)))
            keys = {f"{name}_orig": name}
            _replace(parameters, {keys.get(key, key): p for key, p in parameters.items()})
            _replace(calls, {key: call for key, call in calls.items() if call is not hook})
        yield hooks
    finally:
        for module, name, computed, parameters, calls in reversed(undo):
            _replace(module._parameters, parameters)
            _replace(module._forward_pre_hooks, calls)
            module.__dict__[name] = computed


def _replace(store: dict[Any, Any], entries: dict[Any, Any]) -> None:
    """Replaces the entries of a dict, in order: it decides the first name of a tied parameter."""
    store.clear()
    store.update(entries)


def torch_masks(hooks: Hooks, topology: lap_ext.Topology) -> dict[str, Tensor]:
    """Maps layer names to torch's masks; the weights must be plain parameters."""
    names = {id(layer.weight): name for name, layer in topology.layers.items()}
    masks: dict[str, Tensor] = {}
    for module, hook in hooks:
        weight = module._parameters[hook._tensor_name]
        if id(weight) in names:
            masks[names[id(weight)]] = getattr(module, f"{hook._tensor_name}_mask") != 0
    return masks
