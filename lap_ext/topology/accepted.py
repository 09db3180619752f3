# SPDX-License-Identifier: MIT
"""The module that is traced: what wrappers have inside, and which modules cannot be traced."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from lap_ext._text import layer_name
from lap_ext.errors import LapTypeError, TopologyError

_PARALLEL = {"DataParallel", "DistributedDataParallel"}  # by name: the classes import a lot
_WHOLE = "Prune the model before it is sharded, or a copy with the full state dict."


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the user's module inside torch.compile, DataParallel or DistributedDataParallel."""
    return peeled(model)[-1]


def peeled(model: nn.Module) -> list[nn.Module]:
    """Lists the wrappers around the user's module, outermost first, and that module last."""
    if not isinstance(model, nn.Module):
        raise LapTypeError(
            "{argument} to be a torch.nn.Module", type(model).__name__, argument="model"
        )
    modules = [model]
    while (inside := _inside(modules[-1])) is not None:
        modules.append(inside)
    return modules


def _inside(model: nn.Module) -> nn.Module | None:
    """Returns the module that this one wraps, without names of its own; None if it wraps none."""
    if "_orig_mod" in model._modules:  # torch.compile
        return model._modules["_orig_mod"]
    return model._modules["module"] if _is_a(model, _PARALLEL) else None


def check_traceable(model: nn.Module) -> None:
    """Raises if a module is of a kind that torch.export cannot follow, or has no whole weights."""
    for path, module in model.named_modules():
        at = f"module {path!r}" if path else "the model"
        if _is_a(module, {"FullyShardedDataParallel"}):
            raise TopologyError(
                "whole parameters in each process", f"FullyShardedDataParallel around {at}", _WHOLE
            )
        if isinstance(module, ScriptModule):
            raise TopologyError(
                "modules of Python code (torch.export does not follow TorchScript)",
                f"a {type(module).__name__} as {at}",
                "Build the model from its Python class and load_state_dict the weights of this "
                "one; prune that.",
            )
    for name, x in model.named_parameters():
        if is_lazy(x):
            raise TopologyError(
                "parameters with a shape",
                "one that is not initialized",
                "Run the model once on a batch.",
                layer=layer_name(name),
            )
        if hasattr(x, "device_mesh"):  # fully_shard, tensor parallel
            kind = type(x).__name__
            raise TopologyError(
                "whole parameters in each process", f"a {kind}", _WHOLE, layer=layer_name(name)
            )


def _is_a(module: Any, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)
