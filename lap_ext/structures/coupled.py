# SPDX-License-Identifier: MIT
"""Structures across layers: units whose removal touches several weights at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar, get_args

from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.structures.base import Structure

Kind: TypeAlias = Literal["channel", "head", "expert", "unit"]
KINDS: tuple[str, ...] = get_args(Kind)
Found_co = TypeVar("Found_co", covariant=True)


@dataclass(frozen=True)
class Coupled(Structure):
    """Removes what goes together through the network; also "channel", "head", "expert" or "unit".

    Everything of a unit goes: the rows of the layers that make it, their biases, the norms' weights
    and biases, and the columns of the layers that read it.

    Args:
        kind: "channel", an output channel of layers, through sums, concatenations, splits, gates,
            depthwise and grouped convolutions, and attention; "head", a head of an attention with
            its keys, values and all of its queries; "expert", an expert of a mixture with its row
            of the router; "unit", an inner channel of a feed-forward block.

    Raises:
        ValueError: there is no such kind.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> result = lap_ext.prune(net, torch.ones(1, 4), 0.5, structure="channel")
        >>> int(net[0].bias.count_nonzero()), int(net[2].weight.any(0).count_nonzero())
        (4, 4)
    """

    kind: Kind = "channel"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LapValueError(
                "{argument} to be 'channel', 'head', 'expert' or 'unit'",
                repr(self.kind),
                argument="kind",
            )

    @property
    def spelled(self) -> str:
        """Its kind."""
        return self.kind


class Traced(Protocol[Found_co]):
    """A topology, as far as this room knows it."""

    def groups(self, structure: Kind | Coupled) -> Found_co:
        """Finds the groups of a structure."""


def groups(topology: Traced[Found_co], structure: Kind | Coupled = "channel") -> Found_co:
    """Finds what of a model can only be removed together, and what cannot be removed and why.

    Args:
        topology: what `lap_ext.trace` has returned.
        structure: "channel", "head", "expert" or "unit", as in `Coupled`.

    Returns:
        The groups, a sequence: `groups[i].members` lists what group i has of each parameter;
        `.families` are the groups that are ranked with each other; `.fixed` lists the output
        channels of layers that cannot be removed, each with a reason. Print it for a table.

    Raises:
        TypeError: topology is no topology.
        ValueError: there is no such structure.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3))
        >>> found = lap_ext.structures.groups(lap_ext.trace(net, torch.ones(1, 4)), "channel")
        >>> print(found[1])
        group 1 of 0
          0.weight: rows 1
          2.weight: columns 1
          0.bias: rows 1
        >>> found.fixed
        (Fixed(layer='2', channels=3, reason='an output of the model'),)
    """
    if not hasattr(topology, "groups"):
        raise LapTypeError(
            "{argument} to be what trace returned", type(topology).__name__, argument="topology"
        )
    return topology.groups(structure)
