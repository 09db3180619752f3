# SPDX-License-Identifier: MIT
"""What the groups of every entry of the zoo must have, found by running it (coupling_oracle.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from lap_ext import structures
from lap_ext.topology.coupling import CoupledGroups
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


def checked(name: str) -> Iterator[str]:
    """Everything that is wrong with the groups of an entry, a text each.

    Of each family: the first and the last group, all but one at once, and one at random by its
    gradients. A family of units is a family of channels too, and looked at once.
    """
    network = thinned(name)
    random = torch.Generator().manual_seed(0)
    seen = set()
    every = [(kind, family) for kind in KINDS for family in groups(name, kind).families]
    for kind, family in every:
        members = [groups(name, kind)[i].members for i in family.groups.tolist()]
        about, allowed = f"{name}, {kind}, family {family.name}", (name, family.name) in NOT_ZERO
        key = tuple((x.parameter, *map(_listed, x[-2:])) for x in members[0])
        if key in seen:
            continue
        seen.add(key)
        picks = {"first": members[:1], "last": members[1:][-1:], "all but one": members[1:]}
        for text, units in picks.items():
            faults = network.faults(*units) if units else []
            yield from (f"{about}, {text}: {fault}" for fault in _but(faults, allowed and units))
        if not allowed:
            place = int(torch.randint(len(members), (1,), generator=random))
            yield from (f"{about}, {place}: {x}" for x in network.differences(members[place]))


def _listed(index: Any) -> Any:
    return None if index is None else tuple(index.tolist())


def _but(faults: list[str], allowed: object) -> list[str]:
    """Without the consumers' where these are not expected to hold; they must then fail."""
    others = [text for text in faults if not text.startswith("consumers")]
    if allowed and others == faults:
        return [*others, "consumers may have any values: no need to be listed in NOT_ZERO"]
    return others if allowed else faults


def masks_differ(name: str) -> Iterator[str]:
    """Groups whose masks are not their members."""
    network = thinned(name)
    for kind in KINDS:
        found = groups(name, kind)
        for number in (int(family.groups[-1]) for family in found.families):
            expected: dict[str, Any] = {}
            for part in found[number].members:
                own = network.mask(network.names[part.parameter][0], part)
                expected[part.parameter] = expected.get(part.parameter, torch.zeros_like(own)) | own
            masks = found.masks(torch.arange(len(found)) == number)
            same = masks.keys() == expected.keys()
            if not same or not all(torch.equal(~masks[k], expected[k]) for k in masks):
                yield f"{name}, {kind}, group {number}: {expected.keys()}"


def rows_of(name: str) -> int:
    """How many output channels the layers of an entry have."""
    outputs = set()
    for role in traced(name).roles:
        first = role.part.first[1]
        kind = (role.parameter, role.part.transposed, role.part.groups)
        outputs |= {(kind, first + i) for i in range(role.out.size)}
    return len(outputs)
