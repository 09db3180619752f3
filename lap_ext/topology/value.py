# SPDX-License-Identifier: MIT
"""What the trace knows of a tensor: its shape, its channels, and whether it is a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lap_ext.topology import labels as lab
from lap_ext.topology.channels import Trail
from lap_ext.topology.static import Static

_LONGEST_TRAIL = 12


@dataclass(frozen=True)
class WeightView:
    """A view of one parameter, as a meta tensor: sizes, strides and offset say which part.

    routed: what has picked entries of its first dimension, such as the experts of tokens: an index
    that data makes; meta is the parameter before that.
    """

    parameter: str
    meta: Tensor
    routed: Any = None


@dataclass(frozen=True)
class Value:
    """A tensor of the traced graph."""

    shape: tuple[int, ...]
    labels: Tensor  # int64, of the tensor's rank (labels.py)
    static: Static | None = None  # it depends on parameters, buffers and constants alone
    view: WeightView | None = None  # static, and nothing but a view of a parameter
    trail: Trail = ()  # operations since its channels were born
    terms: tuple[Value, ...] = ()  # what it is the sum of, each with channels of its own
    choice: int | None = None  # of the indices of a top-k: the space of the channels chosen with it

    @property
    def has_channels(self) -> bool:
        """Whether any element belongs to a channel."""
        return bool((self.labels != 0).any())

    def passed(self, name: str, shape: tuple[int, ...], labels: Tensor) -> Value:
        """The same channels after an operation that only moves or maps them."""
        trail = self.trail if self.trail[-1:] == (name,) else (*self.trail, name)
        same = labels is self.labels and shape == self.shape
        return replace(
            self,
            shape=shape,
            labels=labels,
            trail=trail[-_LONGEST_TRAIL:],
            static=None,
            view=None,
            terms=self.terms if same else (),
        )


def plain(shape: tuple[int, ...], static: Static | None = None) -> Value:
    """A tensor without channels."""
    return Value(shape, lab.none(len(shape)), static)


def merged(*trails: Trail) -> Trail:
    """One trail for the result of several values."""
    return tuple(dict.fromkeys(name for trail in trails for name in trail))[-_LONGEST_TRAIL:]


def meta_like(tensor: Tensor) -> Tensor:
    """A contiguous meta tensor of the same shape: an index map that costs no memory."""
    return torch.empty(tensor.shape, dtype=torch.float32, device="meta")
