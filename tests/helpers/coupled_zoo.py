# SPDX-License-Identifier: MIT
"""What the groups of every entry of the zoo must have, found by running it (coupling_oracle.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from lap_ext import structures
from lap_ext.topology.coupling import CoupledGroups, Family
from tests.helpers.coupling_oracle import Thinned
from tests.helpers.topologies import ENTRIES, traced

KINDS = ("channel", "unit", "head")

# Entries of which nothing can go, and why.
NOTHING: dict[str, str] = {}

# Consumers may not have any values, as what is before them is not 0 where a channel is 0.
NOT_ZERO = {("mlp_bn", "4"): "a sigmoid follows"}

# One matrix is used both ways by functions: its uses cannot be told apart, nor changed alone.
ONE_FOR_TWO = {"tied_autoencoder"}


@cache
def groups(name: str, kind: str) -> CoupledGroups:
    return structures.groups(traced(name), kind)


@cache
def thinned(name: str) -> Thinned:
    """The entry, in which a unit's weights can be set to anything."""
    model, args, kwargs = ENTRIES[name].make()
    if hasattr(getattr(model, "config", None), "_experts_implementation"):
        model.config._experts_implementation = "batched_mm"  # grouped_mm has no float64
    layers = {layer.parameter for layer in traced(name).layers.values()}
    others = {n for n, _ in model.named_parameters()} - layers
    return Thinned(model, args, kwargs, vectors=others)


def some(family: Family, count: int) -> list[int]:
    """The first group of a family, its last one and others at random."""
    numbers = family.groups.tolist()
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0)).tolist()
    picked = [0, len(numbers) - 1, *order]
    return [numbers[i] for i in dict.fromkeys(picked)][:count]


def checked(name: str, kind: str) -> Iterator[str]:
    """Everything that is wrong with the groups of an entry, a text each."""
    found, network = groups(name, kind), thinned(name)
    for family in found.families:
        about = f"{name}, {kind}, family {family.name}"
        allowed = (name, family.name) in NOT_ZERO
        for place, number in enumerate(some(family, 3)):
            members = found[number].members
            faults = network.faults(members)
            if not (place or allowed):
                faults += network.differences(members)
            if not network.matters(members):
                faults.append("nothing changes without it")
            yield from (f"{about}, group {number}: {text}" for text in _but(faults, allowed))
        most = [found[i].members for i in family.groups.tolist()[1:]]
        if most:
            faults = network.faults(*most)
            yield from (f"{about}, all but one: {text}" for text in _but(faults, allowed))


def _but(faults: list[str], allowed: bool) -> list[str]:
    """Without the consumers' where these are not expected to hold; they must then fail."""
    others = [text for text in faults if not text.startswith("consumers")]
    if allowed and others == faults:
        return [*others, "consumers may have any values: no need to be listed in NOT_ZERO"]
    return others if allowed else faults


def masks_differ(name: str, kind: str) -> list[str]:
    """Groups whose masks are not their members."""
    found, network = groups(name, kind), thinned(name)
    result = []
    for number in (some(family, 1)[0] for family in found.families):
        gone = torch.zeros(len(found), dtype=torch.bool)
        gone[number] = True
        masks = found.masks(gone)
        expected: dict[str, Any] = {}
        for part in found[number].members:
            first = network.names[part.parameter][0]
            own = network.mask(first, part)
            expected[part.parameter] = expected.get(part.parameter, torch.zeros_like(own)) | own
        same = masks.keys() == expected.keys()
        if not same or not all(torch.equal(~masks[k], expected[k]) for k in masks):
            result.append(f"{name}, {kind}, group {number}: {masks.keys() ^ expected.keys()}")
    return result


def rows_of(name: str) -> int:
    """How many output channels the layers of an entry have."""
    outputs = set()
    for role in traced(name).roles:
        first = role.part.first[1]
        kind = (role.parameter, role.part.transposed, role.part.groups)
        outputs |= {(kind, first + i) for i in range(role.out.size)}
    return len(outputs)
