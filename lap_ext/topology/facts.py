# SPDX-License-Identifier: MIT
"""Facts about channels that the tracer notes beside the channel graph: what removal must respect.

Scores do not need them. coupling/ does: which entries of biases and norms belong to a channel,
which channels an operation couples, where a reshape or a group needs equal numbers, and which
channels are a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lap_ext.topology.work import Product


class Vector(NamedTuple):
    """Entries of a parameter or buffer that belong to channels: of a bias, a norm, a class token.

    Attributes:
        name: of the parameter or buffer, with its path.
        entries: flat indices of entries, int64 [n]; one entry may belong to several channels.
        ids: the channel that each belongs to, int64 [n].
        zeroed: whether a channel that is zero before it stays zero if the entry is set to 0.
        buffer: whether it is a buffer, such as a running mean, which no mask sets to 0.
    """

    name: str
    entries: Tensor
    ids: Tensor
    zeroed: bool
    buffer: bool


class Together(NamedTuple):
    """Sets of channels of which an operation reads all at once, so that none can go alone.

    Attributes:
        row: the number of the set of each channel, int64 [n].
        ids: the channels, int64 [n].
        reason: the operation, in words.
    """

    row: Tensor
    ids: Tensor
    reason: str


class Balanced(NamedTuple):
    """Sets of channels that must stay equal in number, int64 [sets, channels of a set].

    Attributes:
        ids: the channels.
        reason: the operation, in words.
        strict: whether a set must not go as a whole, as the half of a chunk.
    """

    ids: Tensor
    reason: str
    strict: bool


class Heads(NamedTuple):
    """The channels of one attention: row h has those of q, k, v and of the biases of head h.

    Attributes:
        ids: int64 [heads, n]; 0 where a head has fewer.
        values: those of v among them, int64 [heads, m].
        name: of the operation, in words.
    """

    ids: Tensor
    values: Tensor
    name: str


@dataclass(eq=False)
class Facts:
    """All facts of a trace.

    Attributes:
        vectors: entries of biases, norms and other parameters that belong to channels.
        together: sets of channels that an operation couples.
        balanced: sets of channels that must stay equal in number.
        heads: the heads of attentions.
        statistics: channels of kind "reduce" that scale what they are computed from.
        choices: channels among which a top-k chooses, of each top-k.
        large: (channels, name) of parameters with too many entries to be looked at one by one.
        products: multiply-adds of products without a layer's weight (work.py).
        uncounted: operations that multiply as many rows as the data selects.
    """

    vectors: list[Vector] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)
    balanced: list[Balanced] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)
    large: list[tuple[Tensor, str]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    uncounted: list[str] = field(default_factory=list)
