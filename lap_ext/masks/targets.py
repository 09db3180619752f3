# SPDX-License-Identifier: MIT
"""From the names of masks to the parameters of a model, and every check before one is changed.

A layer is named after its parameter without ".weight": "conv1" is conv1.weight; a parameter that is
not called weight keeps its full name, "attn.in_proj_weight". The names that wrappers put in between
("module" of DataParallel, DistributedDataParallel and AveragedModel, "_orig_mod" of torch.compile)
may be there or not, in the mask's name and in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from lap_ext._text import layer_name, lines, parameter_names, some
from lap_ext.ops import check

_WRAPPED = ("module", "_orig_mod")  # what wrappers call the module inside
_LISTED = 10  # of many problems, the first ones say it
_MISSING = "the model has no such parameter"

Modules: TypeAlias = dict[str, Module]
Place: TypeAlias = tuple[Module, str, Tensor]  # owner, attribute of the owner, parameter


class Target(NamedTuple):
    """One mask and the parameter it is for."""

    name: str
    mask: Tensor
    owner: Module
    attribute: str  # of owner
    weight: Tensor  # a Parameter


def find(
    function: str, model: Module, masks: Mapping[str, Tensor], *, write: bool = True
) -> list[Target]:
    """The parameter of each mask, or one ValueError that lists all that does not fit.

    With write also that each can be changed in place, by a mask on its device.
    """
    return _find(function, model, masks, _place, _why_not, write)


def find_pruned(
    function: str, model: Module, masks: Mapping[str, Tensor]
) -> list[tuple[Target, list[Target]]]:
    """As find, for a model pruned with torch.nn.utils.prune: each mask with all its owners."""
    why_not = "not pruned with torch.nn.utils.prune"
    found = _find(function, model, masks, _pruned_place, lambda *_: why_not, write=False)
    return [(target, owners(model, target, "_orig")) for target in found]


def _find(
    function: str,
    model: Module,
    masks: Mapping[str, Tensor],
    place_of: Callable[[Modules, str], Place | None],
    why_not: Callable[[Modules, str], str],
    write: bool,
) -> list[Target]:
    modules = _modules(function, model)
    found: list[Target] = []
    problems: dict[str, str] = {}
    names: dict[int, str] = {}  # id of a parameter -> its mask
    for name, mask in masks.items():
        place = place_of(modules, name)
        if place is None:
            problems[name] = why_not(modules, name)
            continue
        target = Target(name, mask, *place)
        problem = _misfit(target, names.setdefault(id(target.weight), name), write)
        if problem:
            problems[name] = problem
        found.append(target)
    if problems:
        without = _without_mask(model, found) if _MISSING in problems.values() else []
        raise ValueError(_listing(function, problems, without))
    return found


def owners(model: Module, target: Target, suffix: str = "") -> list[Target]:
    """The target once for each place that holds its parameter (several: it is tied)."""
    return [
        target._replace(owner=module, attribute=attribute[: len(attribute) - len(suffix)])
        for module in model.modules()
        for attribute, weight in module._parameters.items()
        if weight is target.weight and attribute.endswith(suffix)
    ]


def zero_(x: Tensor, mask: Tensor) -> None:
    """Sets x to +0.0 where mask is False, whatever stood there (a product would keep NaN)."""
    x = x.detach()  # shares memory and version counter: autograd sees the change
    # one pass without a temporary: 1.5 times faster than masked_fill_ with the inverted mask
    torch.where(mask, x, x.new_zeros(()), out=x)


def is_plain(x: Tensor) -> bool:
    """Whether x is memory with strides: not sparse, quantized, or a subclass such as DTensor."""
    ordinary = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return ordinary and x.layout == torch.strided and not x.is_quantized


def _modules(function: str, model: Module) -> Modules:
    """Every module by its path without the wrappers' names: there the module inside."""
    if not isinstance(model, Module):
        raise TypeError(
            f"{function}: expected model to be a torch.nn.Module, got {type(model).__name__}."
        )
    found: Modules = {}

    def visit(module: Module, path: str) -> None:
        found[path] = module
        wrapper = len(module._modules) == 1 and not module._parameters
        for name, child in module._modules.items():
            if child is not None:
                visit(child, path if wrapper and name in _WRAPPED else _join(path, name))

    visit(model, "")
    return found


def _place(modules: Modules, name: str, suffix: str = "") -> Place | None:
    """Where the parameter with this layer name is."""
    for layer in _spellings(name):
        for parameter in parameter_names(layer):
            path, _, attribute = f"{parameter}{suffix}".rpartition(".")
            owner = modules.get(path)
            weight = None if owner is None else owner._parameters.get(attribute)
            if owner is not None and weight is not None:
                return owner, attribute, weight
    return None


def _pruned_place(modules: Modules, name: str) -> Place | None:
    """Where it is once torch.nn.utils.prune has renamed it; the attribute without "_orig"."""
    place = _place(modules, name, "_orig")
    if place is None:
        return None
    owner, attribute, weight = place
    attribute = attribute.removesuffix("_orig")
    return (owner, attribute, weight) if f"{attribute}_mask" in owner._buffers else None


def _spellings(name: str) -> Iterable[str]:
    """The name, then with less and less of what wrappers add: a user's module may be called so."""
    parts = name.split(".")
    kinds = [parts, [part for part in parts if part != "_orig_mod"]]
    while kinds[-1][:1] == ["module"]:
        kinds.append(kinds[-1][1:])
    kinds.append([part for part in kinds[-1] if part != "module"])
    return dict.fromkeys(".".join(kind) for kind in kinds)


def _why_not(modules: Modules, name: str) -> str:
    """Why no parameter has this layer name."""
    if _pruned_place(modules, name) is not None:
        return (
            "pruned with torch.nn.utils.prune, which keeps its own mask. "
            "Call masks.remove(model) first"
        )
    for parameter in parameter_names(name):
        path, _, attribute = parameter.rpartition(".")
        if isinstance(getattr(modules.get(path), attribute, None), Tensor):
            return (
                f"{parameter} is no parameter but computed from others (a parametrization or "
                "weight norm) or a buffer. Undo that first"
            )
    return _MISSING


def _misfit(target: Target, first: str, write: bool) -> str:
    """What is wrong with the mask for its parameter; empty: nothing."""
    mask, weight = target.mask, target.weight
    if is_lazy(weight):
        return "its parameter is not initialized yet. Run the model once"
    if first != target.name:
        return f"the same parameter as {first!r} (tied). Leave one of the two out"
    if mask.shape != weight.shape:
        return _shapes(mask, weight)
    if not write:
        return ""
    if not is_plain(weight):
        return f"expected a plain dense parameter, got {type(weight).__name__}, {weight.layout}"
    if mask.device != weight.device:
        return f"mask on {mask.device}, parameter on {weight.device}. Use masks.to(device)"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "its parameter was made in inference mode and cannot be changed"
    if check.may_overlap(weight.shape, weight.stride()):
        return (
            f"elements of its parameter share memory (shape {list(weight.shape)}, strides "
            f"{list(weight.stride())}). Make a contiguous copy first"
        )
    return ""


def _shapes(mask: Tensor, weight: Tensor) -> str:
    return f"mask {list(mask.shape)}, parameter {list(weight.shape)}"


def _without_mask(model: Module, found: Iterable[Target]) -> list[str]:
    """Layers of the model (of 2 dimensions or more) that have no mask."""
    masked = {id(target.weight) for target in found}
    return [
        layer_name(name)
        for name, weight in model.named_parameters()
        if id(weight) not in masked and not is_lazy(weight) and weight.dim() >= 2
    ]


def _listing(function: str, problems: dict[str, str], without: list[str]) -> str:
    text = f"{function}: expected masks that fit the model, got {len(problems)} that do not:"
    text += lines([f"{name!r}: {problem}" for name, problem in problems.items()], _LISTED)
    if without:
        text += f"\nLayers of the model without a mask: {some(without, _LISTED)}."
    return text


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
