# SPDX-License-Identifier: MIT
"""What names layers in layers=, exclude= and the keys of a sparsity: patterns and parts of a model.

a name pattern   the layers whose names match it
a module         all layers whose weights lie in it
a type           all layers whose weights lie in modules of this type
a parameter      the layer that it is the weight of
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lap_ext._text import matches, meant_layers, some
from lap_ext.allocation import Sparsity
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.options import Pattern, Patterns, listed
from lap_ext.topology import Layer, Topology

_KINDS = "patterns of layer names, modules, types of modules (nn.Embedding) or parameters"
_LISTED = 5  # of many layers, errors list the first ones


def checked(patterns: Patterns, argument: str) -> tuple[Pattern, ...]:
    """Lists the patterns; raises if one is of another kind."""
    items = listed(patterns)
    for item in items:
        if not _is_pattern(item):
            raise LapTypeError(f"{{argument}} to be {_KINDS}", _kind(item), argument=argument)
    return items


def matching(topology: Topology, pattern: Pattern) -> list[str]:
    """Lists the names of the layers that a pattern stands for, in the order of the network."""
    if isinstance(pattern, str):
        return [name for name in topology.layers if matches(name, pattern)]
    modules: list[nn.Module] = [pattern] if isinstance(pattern, nn.Module) else []
    if isinstance(pattern, type):
        modules = [x for x in topology.model.modules() if isinstance(x, pattern)]
    inside = {id(weight) for module in modules for weight in module.parameters()}
    if isinstance(pattern, Tensor):
        inside = {id(pattern)}
    owners = {id(x) for module in modules for x in module.modules()}  # of computed weights too

    def fits(layer: Layer) -> bool:
        owner = topology.model.get_submodule(layer.parameter.rpartition(".")[0])
        return id(layer.weight) in inside or id(owner) in owners

    return [name for name, layer in topology.layers.items() if fits(layer)]


def all_matching(topology: Topology, patterns: Patterns, argument: str) -> set[str]:
    """Finds the names of layers that match patterns; each pattern must match one."""
    names: set[str] = set()
    for pattern in checked(patterns, argument):
        names.update(_some(topology, pattern, "{argument} patterns that name a layer", argument))
    return names


def by_name(topology: Topology, sparsity: Sparsity) -> Sparsity:
    """Replaces the modules, types and parameters among the keys of a dict by names of layers."""
    if not isinstance(sparsity, Mapping) or all(isinstance(key, str) for key in sparsity):
        return sparsity
    result: dict[str, Any] = {}
    for key, share in sparsity.items():
        if not _is_pattern(key):
            raise LapTypeError(
                f"keys of {{argument}} to be {_KINDS}", _kind(key), argument="sparsity"
            )
        if isinstance(key, str):
            result[key] = share
            continue
        names = _some(topology, key, "keys of {argument} that name a layer", "sparsity")
        free = [name for name in names if not any(matches(name, known) for known in result)]
        result.update(dict.fromkeys(free or names, share))
    return result


def _some(topology: Topology, pattern: Pattern, expected: str, argument: str) -> list[str]:
    """Lists the layers of a pattern; raises if there are none."""
    names = matching(topology, pattern)
    if names:
        return names
    got = repr(pattern) if isinstance(pattern, str) else f"{_kind(pattern)}, with none"
    cure = f"The layers are {some(topology.layers, _LISTED)}."
    if isinstance(pattern, str):
        cure = meant_layers(pattern, list(topology.layers))
    if isinstance(pattern, (nn.Module, Tensor)):
        cure = f"Pass a part of this model. {cure}"
    raise LapValueError(expected, got, cure, argument=argument)


def _is_pattern(x: object) -> bool:
    if isinstance(x, type):
        return issubclass(x, nn.Module)
    return isinstance(x, (str, nn.Module, Tensor))


def _kind(x: object) -> str:
    """Describes what was passed: a type by its name, anything else by its type."""
    if isinstance(x, type):
        return f"the type {x.__name__}"
    return f"a {type(x).__name__}" if isinstance(x, (nn.Module, Tensor)) else type(x).__name__
