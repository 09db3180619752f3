# SPDX-License-Identifier: MIT
"""Describes a layer's neighbors and computes their norms, one per channel of that layer.

    in_norm[i]^2  = sum over producers of ||w_prev[i]||^2 * scale[i]^2
    out_norm[o]^2 = sum over consumers of ||w_next[:, o]||^2 * scale[o]^2

All of this is computed in float64. An identity (a skip connection) adds 1. Across a flatten
(feature = channel * S + position), a channel's squared norm is repeated for its S features, or the
squared norms of the S features are added for their channel.
Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
section 3. The same code serves torch and NumPy: only the Backend differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lap_ext.errors import LapValueError
from lap_ext.ops import check


@dataclass(frozen=True, eq=False)
class Neighbor:
    """Describes one producer or consumer of a layer.

    Args:
        weight: weight of the neighbor, [O, I / groups, *K], or [I, O / groups, *K] if transposed.
            None stands for an identity (a skip connection), which adds 1 to the squared norm.
        groups: number of groups of a grouped or depthwise convolution.
        transposed: whether the weight is that of a transposed convolution, or a linear weight
            stored as [I, O].
        scale: factor for each shared channel, for example that of a batch norm between the two
            layers (see `bn_scale`). Its length is the number of channels on either side. None
            stands for ones.

    Example:
        >>> import torch, lap_ext
        >>> w_prev = lap_ext.Neighbor(torch.tensor([[3., 4.]]), scale=torch.tensor([2.]))
        >>> lap_ext.score(w_prev, torch.tensor([[-7.]]), None)  # |-7| * (5 * 2) * 1
        tensor([[70.]])
    """

    weight: Any = None
    groups: int = 1
    transposed: bool = False
    scale: Any = None


IDENTITY = Neighbor(None)


class Backend(Protocol):
    """What neighbor norms need from torch or NumPy, besides an array's .shape and .reshape."""

    def check_weight(self, name: str, x: Any) -> None:
        """Raises an error unless x is a floating-point array on the device of w."""

    def row_squared_norms(self, x: Any, name: str) -> Any:
        """Sums the squares in each row of x [R, ...] and returns float64 [R]."""

    def col_squared_norms(self, x: Any, groups: int, name: str) -> Any:
        """Sums the squares in each column of x [G * N, C, *K] and returns float64 [G * C]."""

    def ones(self, n: int) -> Any:
        """Makes an array of ones, float64 [n]."""

    def as_float64(self, x: Any, name: str) -> Any:
        """Converts a finite scale to a contiguous float64 array."""

    def repeat(self, x: Any, times: int) -> Any:
        """Repeats each entry of x [n] and returns [n * times]."""

    def norm(self, squared_norms: list[Any]) -> Any:
        """Adds the squared norms [n] in order and takes the square root."""


@dataclass(frozen=True)
class Side:
    """The side of w on which the neighbors are, with the data about w that messages show."""

    name: str  # "w_prev" or "w_next"
    channels: int  # of w on this side
    w_shape: tuple[int, ...]
    w_channels: str  # how the user reads them off w, as in "w.shape[1]"
    w_plain: bool  # neither groups nor transposed were given for w

    @property
    def producer(self) -> bool:
        """Whether the neighbors feed w."""
        return self.name == "w_prev"


def side_of(name: str, w_shape: tuple[int, ...], groups: int, transposed: bool) -> Side:
    """Makes the Side for w [O, I / groups, *K], or [I, O / groups, *K] if transposed."""
    channels = check.layer_channels("w", w_shape, groups, transposed)
    producer = name == "w_prev"
    by_row = producer == transposed
    text = "w.shape[0]" if by_row else f"w.shape[1]{' * groups' if groups > 1 else ''}"
    plain = groups == 1 and not transposed
    return Side(name, channels[0 if producer else 1], w_shape, text, plain)


def norm_of(side: Side, neighbors: Any, backend: Backend) -> Any:
    """Computes the norm for each channel of w on one side, float64 [channels].

    Args:
        side: the side of w on which the neighbors are.
        neighbors: None, a weight, a Neighbor, or a list or tuple of these, whose squared norms are
            added in order.
        backend: the Backend of torch or NumPy.
    """
    if neighbors is None:
        return backend.ones(side.channels)
    squared_norms: list[Any] = []
    for name, neighbor in listed(side, neighbors):
        squared_norms += _squared_norms(side, name, neighbor, backend)
    return backend.norm(squared_norms)


def listed(side: Side, neighbors: Any) -> list[tuple[str, Neighbor]]:
    """Lists one neighbor or more, each with the name that errors call it by."""
    if not isinstance(neighbors, (list, tuple)):
        return [(side.name, _as_neighbor(neighbors))]
    if len(neighbors) == 0:
        raise LapValueError(
            "{argument} to name one neighbor or more",
            "an empty sequence",
            "Pass None for a layer without one.",
            argument=side.name,
        )
    return [(f"{side.name}[{n}]", _as_neighbor(item)) for n, item in enumerate(neighbors)]


def needs_check(neighbors: Any) -> bool:
    """Tells whether finite squared norms may leave float64's range on the way to a norm."""
    if isinstance(neighbors, (list, tuple)):
        return True
    return isinstance(neighbors, Neighbor) and neighbors.scale is not None


def _as_neighbor(item: Any) -> Neighbor:
    return item if isinstance(item, Neighbor) else Neighbor(item)


def _squared_norms(side: Side, name: str, neighbor: Neighbor, backend: Backend) -> list[Any]:
    """Computes one neighbor's squared norms: float64 vectors [side.channels] to be added."""
    n = side.channels
    if neighbor.weight is None:
        return [_scaled(side, name, backend.ones(n), neighbor.scale, (n,), backend)]
    backend.check_weight(name, neighbor.weight)
    per, times = meeting(side, name, neighbor)
    if per > 1:
        return _from_fine(side, name, neighbor, per, backend)
    squared_norm = _reduce(side, name, neighbor, neighbor.weight, backend)
    if times > 1:
        return [_from_coarse(side, name, squared_norm, neighbor.scale, times, backend)]
    return [_scaled(side, name, squared_norm, neighbor.scale, (n,), backend)]


def meeting(side: Side, name: str, neighbor: Neighbor) -> tuple[int, int]:
    """Counts the neighbor's channels that meet one of w, and those of w that meet one of its.

    One of them is above 1 where a flatten joins a convolution and a linear weight.
    """
    c, n = _channels(side, name, neighbor), side.channels
    w_is_linear = len(side.w_shape) == 2
    is_linear = len(neighbor.weight.shape) == 2
    if c == n:
        return 1, 1
    if c > n > 0 and c % n == 0 and is_linear and not w_is_linear and neighbor.groups == 1:
        return c // n, 1
    if n > c > 0 and n % c == 0 and w_is_linear and not is_linear:
        return 1, n // c
    raise _no_meeting(side, name, neighbor, c)


def _channels(side: Side, name: str, neighbor: Neighbor) -> int:
    """Counts the channels that the neighbor has on w's side."""
    shape = tuple(neighbor.weight.shape)
    into, out = check.layer_channels(name, shape, neighbor.groups, neighbor.transposed)
    return out if side.producer else into


def _reduce(side: Side, name: str, neighbor: Neighbor, weight: Any, backend: Backend) -> Any:
    """Sums the weight's squares over all but the channels it shares with w."""
    if side.producer == neighbor.transposed:
        return backend.col_squared_norms(weight, neighbor.groups, name)
    return backend.row_squared_norms(weight, name)


def _from_coarse(
    side: Side, name: str, squared_norm: Any, scale: Any, positions: int, backend: Backend
) -> Any:
    """Repeats the squared norms [c] of a convolution next to a linear w [n = c * positions]."""
    coarse = squared_norm.shape[0]
    if scale is None or tuple(scale.shape) == (coarse,):
        squared_norm = _scaled(side, name, squared_norm, scale, (coarse,), backend)
        return backend.repeat(squared_norm, positions)
    lengths = (coarse, coarse * positions)
    return _scaled(side, name, backend.repeat(squared_norm, positions), scale, lengths, backend)


def _from_fine(
    side: Side, name: str, neighbor: Neighbor, positions: int, backend: Backend
) -> list[Any]:
    """Reduces a linear weight with n * positions features next to a convolution w [n channels]."""
    n, weight, scale = side.channels, neighbor.weight, neighbor.scale
    fine = n * positions
    if scale is None or tuple(scale.shape) != (fine,):
        by_row = side.producer != neighbor.transposed
        rest = weight.shape[1] if by_row else weight.shape[0]
        # the features become [n, positions]; the positions are summed with the other elements
        shape = (n, positions * rest) if by_row else (rest, n, positions)
        squared_norm = _reduce(side, name, neighbor, weight.reshape(shape), backend)
        return [_scaled(side, name, squared_norm, scale, (n, fine), backend)]
    squared_norm = _reduce(side, name, neighbor, weight, backend)
    squared_norm = _scaled(side, name, squared_norm, scale, (fine,), backend).reshape(n, positions)
    return [squared_norm[:, position] for position in range(positions)]


def _scaled(
    side: Side, name: str, squared_norm: Any, scale: Any, lengths: tuple[int, ...], backend: Backend
) -> Any:
    """Multiplies squared norms by the squared scale, one entry per channel."""
    if scale is None:
        return squared_norm
    argument = f"{name}.scale"
    values = backend.as_float64(scale, argument)
    check.vector(argument, tuple(values.shape), lengths, "shared channel")
    return squared_norm * (values * values)


def _no_meeting(side: Side, name: str, neighbor: Neighbor, c: int) -> LapValueError:
    """Makes the error about channels that do not fit those of w."""
    shape = tuple(neighbor.weight.shape)
    by_row = side.producer != neighbor.transposed
    groups = f" * {neighbor.groups} groups" if neighbor.groups > 1 else ""
    mine = "{argument}.shape[0]" if by_row else f"{{argument}}.shape[1]{groups}"
    why = "its outputs feed w's inputs" if side.producer else "it reads w's outputs"
    return LapValueError(
        f"{mine} == {side.w_channels} ({why})",
        f"{{argument}} {list(shape)} and w {list(side.w_shape)}, that is {c} and {side.channels} "
        "channels",
        _cure(side, neighbor, c),
        argument=name,
    )


def _cure(side: Side, neighbor: Neighbor, c: int) -> str:
    """Suggests what may have been forgotten where c channels do not fit those of w."""
    shape, n = tuple(neighbor.weight.shape), side.channels
    if neighbor.groups == 1 and not neighbor.transposed and len(shape) > 2:
        if not side.producer and c and n % c == 0 and shape[0] % (n // c) == 0:
            return f"A depthwise or grouped neighbor needs Neighbor(weight, groups={n // c})."
        if shape[1 if side.producer else 0] == n:
            return "A transposed convolution needs Neighbor(weight, transposed=True)."
    if side.w_plain and len(side.w_shape) > 2:
        if side.producer and n and c % n == 0 and side.w_shape[0] % (c // n) == 0:
            return f"If w is depthwise or grouped, pass groups={c // n}."
        if side.w_shape[0 if side.producer else 1] == c:
            return "If w is the weight of a transposed convolution, pass transposed=True."
    if c and n and (c % n == 0 or n % c == 0):
        return "Unequal counts meet only where a flatten joins a convolution and a linear weight."
    return "Check that {argument} is the layer next to w."
