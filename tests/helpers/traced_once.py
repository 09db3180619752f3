# SPDX-License-Identifier: MIT
"""Traces that are made once a process: hundreds of tests prune a few small models.

Only models whose whole structure can be written down are known again: stacks of torch's own modules
without hooks, and without buffers but the statistics of batch norms, which a checkpoint's files
give; and transformers' models, which their config determines. Errors are not kept, and every other
model is traced each time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lap_ext import Topology
from lap_ext.topology import trace

_TRACED: dict[str, Topology] = {}


def traced_once(model: nn.Module, example_inputs: Any, **options: Any) -> Topology:
    """Traces as lap_ext.trace does, or returns what the same trace has returned before."""
    structure = _structure(model)
    if structure is None:
        return trace(model, example_inputs, **options)
    inputs = pytree.tree_map_only(Tensor, _kind, example_inputs)
    key = repr((structure, _tensors(model), inputs, sorted(options.items())))
    if key not in _TRACED:
        _TRACED[key] = trace(model, example_inputs, **options)
    return _TRACED[key]


def bound_once(model: nn.Module, example_inputs: Any, **options: Any) -> Topology:
    """Traces as traced_once does, and binds what it returns to the model."""
    return traced_once(model, example_inputs, **options).bind(model)


def _structure(model: nn.Module) -> Any:
    """What a model computes, but for its tensors; None: it cannot be told."""
    modules = list(model.modules())
    if any("forward" in vars(x) or x._forward_hooks or x._forward_pre_hooks for x in modules):
        return None
    home = type(model).__module__
    if home.startswith("transformers.models."):
        return home, model, model.config.to_json_string(), model.config._attn_implementation
    own = all(type(x).__module__.startswith("torch.nn.modules.") for x in modules)
    others = [x for x in modules if not isinstance(x, nn.modules.batchnorm._BatchNorm)]
    return model if own and not any(x._buffers for x in others) else None


def _tensors(model: nn.Module) -> list[Any]:
    """Names and kinds of tensors, which of them are one, and the mode of each module."""
    named = list(model.named_parameters(remove_duplicate=False))
    named += model.named_buffers(remove_duplicate=False)
    first = {id(x): name for name, x in reversed(named)}
    tensors = [(name, first[id(x)], _kind(x)) for name, x in named]
    return [*tensors, *(x.training for x in model.modules())]


def _kind(x: Tensor) -> Any:
    return type(x), tuple(x.shape), x.dtype, x.device, x.stride()
