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
NOTHING = {
    "hf_convnextv2": "the stream is read by LayerNorm, inner channels by a mean over all of them"
}

# Consumers may not have any values, as what is before them is not 0 where a channel is 0.
NOT_ZERO = {("mlp_bn", "4"): "a sigmoid follows"}

# One matrix is used both ways by functions: its uses cannot be told apart, nor changed alone.
ONE_FOR_TWO = {"tied_autoencoder"}


# Weights that are idle without a head and stay: they are looked up by position and added to its
# logits, and no layer's output channels. They change nothing; a mask leaves them as they are.
STAYING = {"swin": "bias_table", "hf_swin": "relative_position_bias_table"}

# Random weights of the classes' own are so small that what reaches the output is rounding.
VANISHING = {"hf_mobilenet_v2", "hf_efficientnet"}
STEPS = {"hf_mobilenet_v2": 6}  # every sixth family of the widest network


@cache
def groups(name: str, kind: str) -> CoupledGroups:
    return structures.groups(traced(name), kind)


@cache
def thinned(name: str) -> Thinned:
    """The entry, in which a unit's weights can be set to anything."""
    model, args, kwargs = ENTRIES[name].make()
    if hasattr(getattr(model, "config", None), "_experts_implementation"):
        model.config._experts_implementation = "batched_mm"  # grouped_mm has no float64
    for parameter in model.parameters() if name in VANISHING else ():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
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
    for kind, family in every[:: STEPS.get(name, 1)]:
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
        if not allowed and len(members) > 1:  # a single one takes all that leads to it
            place = int(torch.randint(len(members), (1,), generator=random))
            wrong = network.differences(members[place])
            staying = [x for x in wrong if kind == "head" and STAYING.get(name, ":") in x]
            yield from (f"{about}, {place}: {x}" for x in wrong if x not in staying)
            if kind == "head" and name in STAYING and not staying:
                yield f"{about}: no need to be listed in STAYING"


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
