# SPDX-License-Identifier: MIT
"""What the trace knows about a tensor: its shape, its channels, and whether it is a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.channels import Trail
from lap_ext.topology.static import Static

_LONGEST_TRAIL = 12


@dataclass(frozen=True)
class Computation:
    """How the weight of an operation is computed from its parameter, entry by entry.

    value: the weight, in the shape of the parameter.
    factor: whether each entry is that of the parameter times something independent of it, so that
    it is zero where the parameter is.
    alive: tensors that are False where a mask, which no training changes, makes the weight zero.
    operation: the first one that is no such factor, as errors name it.
    """

    value: Static
    factor: bool = True
    alive: tuple[Static, ...] = ()
    operation: str = ""


@dataclass(frozen=True)
class WeightView:
    """A view of one parameter, as a meta tensor: sizes, strides and offset say which part.

    routed: the data-dependent index that has picked entries of its first dimension, such as the
    experts of tokens; meta is the parameter before that.
    computation: how the entries are computed from those of the parameter; None: they are these.
    """

    parameter: str
    meta: Tensor
    routed: Any = None
    computation: Computation | None = None


@dataclass(frozen=True)
class Value:
    """A tensor of the traced graph."""

    shape: tuple[int, ...]
    ids: Tensor  # int64, of the tensor's rank (channel_ids.py)
    static: Static | None = None  # it depends on parameters, buffers and constants alone
    view: WeightView | None = None  # static, and only a view of a parameter
    trail: Trail = ()  # operations since its channels were created
    terms: tuple[Value, ...] = ()  # its summands, each with its own channels
    choice: int | None = None  # of a top-k's indices: the index of the group that it created

    @property
    def has_channels(self) -> bool:
        """Whether any element belongs to a channel."""
        return bool((self.ids != 0).any())

    def passed(self, name: str, shape: tuple[int, ...], ids: Tensor) -> Value:
        """Returns the same channels after an operation that only moves or maps them."""
        trail = self.trail if self.trail[-1:] == (name,) else (*self.trail, name)
        same = ids is self.ids and shape == self.shape
        return replace(
            self,
            shape=shape,
            ids=ids,
            trail=trail[-_LONGEST_TRAIL:],
            static=None,
            view=None,
            terms=self.terms if same else (),
        )


def plain(shape: tuple[int, ...], static: Static | None = None) -> Value:
    """Returns a tensor without channels."""
    return Value(shape, channel_ids.none(len(shape)), static)


def merged(*trails: Trail) -> Trail:
    """Merges the trails of several values into one."""
    return tuple(dict.fromkeys(name for trail in trails for name in trail))[-_LONGEST_TRAIL:]


def meta_like(tensor: Tensor) -> Tensor:
    """Returns a contiguous meta tensor of the same shape: an index map that costs no memory."""
    return torch.empty(tensor.shape, dtype=torch.float32, device="meta")
