# SPDX-License-Identifier: MIT
"""What a topology depends on in its model, as texts: models with equal texts share a topology.

    built        classes of modules; names, shapes and ties of parameters and buffers; attributes of
                 PyTorch's own modules (stride, groups, eps)
    attributes   attributes of all other modules without a leading underscore: numbers, texts,
                 functions; of objects such as configs, the numbers and flags
    constants    buffers whose values say which channel is which (a permutation, a mask)

Other values, dtypes, devices and the training mode do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from lap_ext.computed import as_parameters

_OF_MODULES = frozenset(vars(nn.Module()))
# attributes that do not change what feeds a weight in evaluation mode
_IGNORED = {"inplace", "momentum", "use_cache", "gradient_checkpointing", "name_or_path"}
_PLAIN = (bool, int, float, str, type(None), Tensor, partial, FunctionType, BuiltinFunctionType,
          list, tuple, dict)  # fmt: skip
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
    with as_parameters(model):  # a mask that multiplies what a module computes is no difference
        return _structure(model, constants)


def _structure(model: nn.Module, constants: Mapping[str, Tensor]) -> ModelStructure:
    built: dict[str, str] = {}
    attributes: dict[str, str] = {}
    seen: set[int] = set()  # a config that many modules hold is described once
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        at = f"module {path!r}" if path else "the model"
        built[at] = f"{kind.__module__}.{kind.__qualname__}"
        if not isinstance(module, _DropoutNd):
            of_torch = kind.__module__.startswith("torch.nn.modules.")
            known = {*_OF_MODULES, *(n.removesuffix("_orig") for n in module._parameters)}
            own = {n: x for n, x in vars(module).items() if n not in known}
            prefix = f"{path}." if path else ""
            (built if of_torch else attributes).update(_places(prefix, own, seen))
    named = {"parameter": model.named_parameters, "buffer": model.named_buffers}
    tensors: dict[str, Tensor] = {}
    for word, list_named in named.items():
        first: dict[int, str] = {}
        for name, x in list_named(remove_duplicate=False):
            if word == "buffer" and name not in constants and _is_mask(name, tensors):
                continue
            shared = first.setdefault(id(x), name)
            tied = "" if shared == name else f", the same as {shared!r}"
            shape = "not initialized" if is_lazy(x) else str(list(x.shape))
            built[f"{word} {name!r}"] = shape + tied
            tensors[name] = x
    values = {name: tensors[name].detach() for name in constants if name in tensors}
    return ModelStructure(built, attributes, values)


def _is_mask(buffer: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether torch.nn.utils.prune keeps a mask of a parameter in a buffer."""
    name = buffer.removesuffix("_mask")
    return name != buffer and (name in parameters or f"{name}_orig" in parameters)


def _places(prefix: str, values: Mapping[str, Any], seen: set[int]) -> Iterator[tuple[str, str]]:
    """Yields (place, text) of attributes, and of the numbers and flags in objects among them."""
    for name, value in values.items():
        if name in _IGNORED or name.startswith("_") or isinstance(value, (torch.dtype, type)):
            continue
        if isinstance(value, _PLAIN):
            yield f"{prefix}{name}", _text(value)
        elif id(value) not in seen and hasattr(value, "__dict__"):
            seen.add(id(value))
            inside = {n: x for n, x in vars(value).items() if _is_numeric(x)}
            yield from _places(f"{prefix}{name}.", inside, seen)


def _is_numeric(x: Any) -> bool:
    """Whether a value in an object counts: a number, a flag, a sequence of them, an object."""
    if isinstance(x, (list, tuple)):
        return all(map(_is_numeric, x))
    return isinstance(x, (bool, int, float)) or not isinstance(x, (*_PLAIN, type(None)))


def _text(x: Any) -> str:
    """Writes a value so that equal values, and copies, have equal texts."""
    if isinstance(x, Tensor):
        known = x.numel() <= _LARGEST and not x.is_meta and not isinstance(x, FakeTensor)
        return f"{list(x.shape)} {x.tolist() if known else ''}"
    if isinstance(x, partial):
        return _text((x.func, x.args, x.keywords))
    if isinstance(x, FunctionType):
        bound = [cell.cell_contents for cell in x.__closure__ or ()]
        where = f"{x.__module__}.{x.__qualname__}, line {x.__code__.co_firstlineno}"
        return f"{where}, of {_text(bound)}" if bound else where
    if isinstance(x, (list, tuple)):
        return f"({', '.join(map(_text, x))})"
    if isinstance(x, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in x.items())
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)
    return str(getattr(x, "__qualname__", type(x).__qualname__))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether values agree in the lower of two precisions."""
    if b.is_meta or isinstance(b, FakeTensor):
        return True
    a, b = a.to("cpu"), b.to("cpu")
    if a.is_floating_point() and b.is_floating_point():
        lower = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        a, b = a.to(lower), b.to(lower)
    return torch.equal(a, b)
