# SPDX-License-Identifier: MIT
"""What a topology depends on in its model, as texts: models with equal texts share a topology.

    built        classes of modules; names, shapes and ties of parameters and buffers; attributes of
                 PyTorch's own modules (stride, groups, eps)
    attributes   attributes of all other modules without a leading underscore: numbers, texts,
                 functions, and the numbers and flags in objects such as configs
    constants    buffers whose values say which channel is which (a permutation, a mask)

Other values, dtypes, devices and the training mode do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

_OF_MODULES = frozenset(vars(nn.Module()))
# attributes that do not change what feeds a weight in evaluation mode
_IGNORED = {"inplace", "momentum", "use_cache", "gradient_checkpointing"}
_DEEPEST = 4  # objects within objects
_LARGEST = 4_096  # elements of a tensor that is an attribute


@dataclass(frozen=True)
class ModelStructure:
    """The structure of a model when it was traced."""

    built: Mapping[str, str]
    attributes: Mapping[str, str]
    constants: Mapping[str, Tensor]  # name of a buffer -> its values

    def difference(self, model: nn.Module, *, same_model: bool) -> str:
        """Names the first difference of a model; empty where there is none.

        Args:
            model: as it is now.
            same_model: whether it is the traced one, in whose own classes attributes may change
                (a count of steps).
        """
        now = structure_of(model, self.constants)
        kinds = [(self.built, now.built)]
        if not same_model:
            kinds.append((self.attributes, now.attributes))
        for traced, found in kinds:
            for place in {**traced, **found}:
                if traced.get(place) != found.get(place):
                    then = traced.get(place, "none")
                    return f"{place} {found.get(place, 'missing')} (traced: {then})"
        for name, values in self.constants.items():
            if not _equal(values, now.constants[name]):
                return f"other values in the buffer {name!r}, which say which channel is which"
        return ""


def structure_of(model: nn.Module, constants: Mapping[str, Tensor]) -> ModelStructure:
    """Describes a model.

    Args:
        model: any module.
        constants: the buffers whose values count, by name.
    """
    built: dict[str, str] = {}
    attributes: dict[str, str] = {}
    shared: dict[int, str] = {}  # a config that many modules hold is described once
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        built[f"module {path!r}" if path else "the model"] = (
            f"{kind.__module__}.{kind.__qualname__}"
        )
        if not isinstance(module, _DropoutNd):
            of_torch = kind.__module__.startswith("torch.nn.modules.")
            found = built if of_torch else attributes
            for name, value in _attributes(module):
                place = f"{path}.{name}".lstrip(".")
                known = shared.setdefault(id(value), place) if hasattr(value, "__dict__") else place
                if text := _text(value) if known == place else f"that of {known}":
                    found[place] = text
    named = {"parameter": model.named_parameters, "buffer": model.named_buffers}
    tensors: dict[str, Tensor] = {}
    for word, list_named in named.items():
        first: dict[int, str] = {}
        for name, x in list_named(remove_duplicate=False):
            shared = first.setdefault(id(x), name)
            tied = "" if shared == name else f", the same as {shared!r}"
            shape = "not initialized" if is_lazy(x) else str(list(x.shape))
            built[f"{word} {name!r}"] = shape + tied
            tensors[name] = x
    values = {name: tensors[name].detach() for name in constants if name in tensors}
    return ModelStructure(built, attributes, values)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the attributes that count."""
    for name, value in vars(module).items():
        if name not in _OF_MODULES and name not in _IGNORED and not name.startswith("_"):
            yield name, value


def _text(x: Any, depth: int = 0) -> str:
    """Writes a value so that equal values, and copies, have equal texts."""
    if isinstance(x, (torch.dtype, torch.device)):
        return ""
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)
    if isinstance(x, Tensor):
        known = x.numel() <= _LARGEST and not x.is_meta and not isinstance(x, FakeTensor)
        return f"{list(x.shape)} {x.tolist() if known else ''}"
    if isinstance(x, partial):
        return _text((x.func, x.args, x.keywords), depth)
    if isinstance(x, FunctionType):
        bound = _text([cell.cell_contents for cell in x.__closure__ or ()], depth)
        return f"{x.__module__}.{x.__qualname__}, line {x.__code__.co_firstlineno}{bound}"
    if isinstance(x, (list, tuple)) and depth < _DEEPEST:
        return f"({', '.join(_text(item, depth + 1) for item in x)})" if x else ""
    if isinstance(x, dict) and depth < _DEEPEST:
        return ", ".join(f"{key}: {_text(item, depth + 1)}" for key, item in x.items())
    kind = type(x).__qualname__
    if depth >= _DEEPEST or isinstance(x, (nn.Module, type)) or not hasattr(x, "__dict__"):
        return str(getattr(x, "__qualname__", kind))
    inside = [
        f"{name}={_text(item, depth + 1)}"
        for name, item in sorted(vars(x).items())
        if not name.startswith("_") and name not in _IGNORED and not isinstance(item, str)
    ]
    return f"{kind}({', '.join(inside)})"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether values agree in the lower of two precisions."""
    if b.is_meta or isinstance(b, FakeTensor):
        return True
    a, b = a.to("cpu"), b.to("cpu")
    if a.is_floating_point() and b.is_floating_point():
        lower = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        a, b = a.to(lower), b.to(lower)
    return torch.equal(a, b)
