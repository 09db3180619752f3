# SPDX-License-Identifier: MIT
"""A model's forward as torch.export takes it: outputs without caches, objects as their tensors.

Language models of transformers return a cache of keys and values. It is no output: layers that
feed it would count as read by it. `use_cache` may be an argument, or hide in configs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lap_ext.errors import LapError
from lap_ext.topology.failures import failure

_PLAIN = (Tensor, int, float, complex, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Switches use_cache off in all configs, makes outputs plain, and says where forward fails."""
    configs = [config for config in _configs(model) if getattr(config, "use_cache", None) is True]
    before = vars(model).get("forward")
    forward = model.forward

    @functools.wraps(forward)
    def plain_forward(*args: Any, **named: Any) -> Any:
        try:
            outputs = forward(*args, **named)
        except LapError:
            raise
        except Exception as error:  # here, before torch.export prints the graph so far
            raise failure(model, error) from error
        return _plain(outputs)

    try:
        for config in configs:
            config.use_cache = False
        vars(model)["forward"] = plain_forward
        yield
    finally:
        for config in configs:
            config.use_cache = True
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before


def _configs(model: nn.Module) -> list[Any]:
    """Lists the configs of all modules, and the configs in them."""
    found: dict[int, Any] = {}
    pending = [vars(module).get("config") for module in model.modules()]
    while pending:
        config = pending.pop()
        if hasattr(config, "__dict__") and hasattr(config, "use_cache") and id(config) not in found:
            found[id(config)] = config
        if hasattr(config, "__dict__") and hasattr(config, "to_dict"):
            pending += [
                x for x in vars(config).values() if hasattr(x, "to_dict") and x is not config
            ]
    return list(found.values())


def _plain(outputs: Any) -> Any:
    """Replaces the objects among outputs by lists of their tensors, and caches by nothing."""
    return pytree.tree_map(
        lambda x: x if isinstance(x, _PLAIN) else _tensors_in(x, set()), outputs, is_leaf=_is_cache
    )


def _is_cache(x: Any) -> bool:
    return type(x).__name__.endswith("Cache")


def _tensors_in(x: Any, seen: set[int]) -> list[Tensor]:
    """Lists the tensors in an object and in the objects that it holds."""
    if isinstance(x, Tensor):
        return [x]
    if id(x) in seen or isinstance(x, (nn.Module, type)) or _is_cache(x):
        return []
    seen.add(id(x))
    items = x if isinstance(x, (list, tuple, dict)) else getattr(x, "__dict__", {})
    values = items.values() if isinstance(items, dict) else items
    return [tensor for item in values for tensor in _tensors_in(item, seen)]
