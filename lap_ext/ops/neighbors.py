# SPDX-License-Identifier: MIT
"""Neighbors of a layer and their squared norms, one per channel of the layer between them.

    in_norm[i]^2  = sum over producers of ||w_prev[i]||^2 * scale[i]^2
    out_norm[o]^2 = sum over consumers of ||w_next[:, o]||^2 * scale[o]^2

All in float64. An identity (a skip connection) adds 1. Across a flatten (feature = channel * S +
position) the coarse side's energies repeat S times, the fine side's positions add up.
Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
section 3. The code is one for torch and NumPy: what differs is the Backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lap_ext.ops import check


@dataclass(frozen=True, eq=False)
class Neighbor:
    """One producer or consumer of a layer.

    Args:
        weight: its weight, [O, I / groups, *K] ([I, O / groups, *K] when transposed). None for an
            identity, that is a skip connection, which adds 1 to the squared factor.
        groups: groups of a grouped or depthwise convolution.
        transposed: the weight of a transposed convolution (or a linear weight kept as [I, O]).
        scale: factor of each shared channel, such as a batch norm between the two layers
            (see `bn_scale`); its length is the channels of either side. None: ones.

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
    """What the resolution needs from torch or NumPy. An array has .shape and .reshape."""

    def check_weight(self, name: str, x: Any) -> None:
        """Raises unless x is a floating array on the device of w."""

    def row_energy(self, x: Any, name: str) -> Any:
        """Sum of squares of each row of x [R, ...], float64 [R]."""

    def col_energy(self, x: Any, groups: int, name: str) -> Any:
        """Sum of squares of each column of x [G * N, C, *K], float64 [G * C]."""

    def ones(self, n: int) -> Any:
        """Float64 ones [n]."""

    def as_float64(self, x: Any, name: str) -> Any:
        """A finite scale as float64, contiguous."""

    def repeat(self, x: Any, times: int) -> Any:
        """Each entry of x [n] repeated, [n * times]."""

    def norm(self, energies: list[Any]) -> Any:
        """Square root of the sum of the energies [n], added in order."""


@dataclass(frozen=True)
class Side:
    """The side of w on which neighbors are resolved, and w as it appears in messages."""

    function: str
    name: str  # "w_prev" or "w_next"
    channels: int  # of w on this side
    w_shape: tuple[int, ...]
    w_channels: str  # how the user reads them off w, as in "w.shape[1]"
    w_plain: bool  # neither groups nor transposed were given for w

    @property
    def producer(self) -> bool:
        """Whether the neighbors feed w."""
        return self.name == "w_prev"


def side_of(
    function: str, name: str, w_shape: tuple[int, ...], groups: int, transposed: bool
) -> Side:
    """The Side for w [O, I / groups, *K]; transposed [I, O / groups, *K]."""
    channels = check.layer_channels(function, "w", w_shape, groups, transposed)
    producer = name == "w_prev"
    by_row = producer == transposed
    text = "w.shape[0]" if by_row else f"w.shape[1]{' * groups' if groups > 1 else ''}"
    plain = groups == 1 and not transposed
    return Side(function, name, channels[0 if producer else 1], w_shape, text, plain)


def norm_of(side: Side, neighbors: Any, backend: Backend) -> Any:
    """Norms over the channels of w, float64 [channels].

    neighbors: None, a weight, a Neighbor, or a list or tuple of these (their squares add in order).
    """
    if neighbors is None:
        return backend.ones(side.channels)
    if not isinstance(neighbors, (list, tuple)):
        return backend.norm(_energies(side, side.name, _as_neighbor(neighbors), backend))
    if len(neighbors) == 0:
        raise ValueError(
            f"{side.function}: expected {side.name} to name one neighbor or more, got an empty "
            f"sequence. Pass None for a layer without one."
        )
    energies: list[Any] = []
    for position, item in enumerate(neighbors):
        energies += _energies(side, f"{side.name}[{position}]", _as_neighbor(item), backend)
    return backend.norm(energies)


def needs_check(neighbors: Any) -> bool:
    """Whether energies, though finite, may leave float64's range on the way to a norm."""
    if isinstance(neighbors, (list, tuple)):
        return True
    return isinstance(neighbors, Neighbor) and neighbors.scale is not None


def _as_neighbor(item: Any) -> Neighbor:
    return item if isinstance(item, Neighbor) else Neighbor(item)


def _energies(side: Side, name: str, neighbor: Neighbor, backend: Backend) -> list[Any]:
    """Squared norms of one neighbor: float64 vectors [side.channels] that are to be added."""
    n = side.channels
    if neighbor.weight is None:
        return [_scaled(side, name, backend.ones(n), neighbor.scale, (n,), backend)]
    backend.check_weight(name, neighbor.weight)
    c = _channels(side, name, neighbor)
    w_is_linear = len(side.w_shape) == 2
    is_linear = len(neighbor.weight.shape) == 2
    if c == n:
        energy = _reduce(side, name, neighbor, neighbor.weight, backend)
        return [_scaled(side, name, energy, neighbor.scale, (n,), backend)]
    if c > n > 0 and c % n == 0 and is_linear and not w_is_linear and neighbor.groups == 1:
        return _from_fine(side, name, neighbor, c // n, backend)
    if n > c > 0 and n % c == 0 and w_is_linear and not is_linear:
        energy = _reduce(side, name, neighbor, neighbor.weight, backend)
        return [_from_coarse(side, name, energy, neighbor.scale, n // c, backend)]
    raise ValueError(_no_meeting(side, name, neighbor, c))


def _channels(side: Side, name: str, neighbor: Neighbor) -> int:
    """Channels that the neighbor has on w's side."""
    shape = tuple(neighbor.weight.shape)
    into, out = check.layer_channels(
        side.function, name, shape, neighbor.groups, neighbor.transposed
    )
    return out if side.producer else into


def _reduce(side: Side, name: str, neighbor: Neighbor, weight: Any, backend: Backend) -> Any:
    """Squares of the weight, summed over all but the channels it shares with w."""
    if side.producer == neighbor.transposed:
        return backend.col_energy(weight, neighbor.groups, name)
    return backend.row_energy(weight, name)


def _from_coarse(
    side: Side, name: str, energy: Any, scale: Any, positions: int, backend: Backend
) -> Any:
    """Conv next to a linear w [n = c * positions]: each channel's energy [c] counts everywhere."""
    coarse = energy.shape[0]
    if scale is None or tuple(scale.shape) == (coarse,):
        energy = _scaled(side, name, energy, scale, (coarse,), backend)
        return backend.repeat(energy, positions)
    lengths = (coarse, coarse * positions)
    return _scaled(side, name, backend.repeat(energy, positions), scale, lengths, backend)


def _from_fine(
    side: Side, name: str, neighbor: Neighbor, positions: int, backend: Backend
) -> list[Any]:
    """Linear weight with n * positions features next to a convolution w [n channels]."""
    n, weight, scale = side.channels, neighbor.weight, neighbor.scale
    fine = n * positions
    if scale is None or tuple(scale.shape) != (fine,):
        by_row = side.producer != neighbor.transposed
        rest = weight.shape[1] if by_row else weight.shape[0]
        # the features become [n, positions]; the positions are summed with the other elements
        shape = (n, positions * rest) if by_row else (rest, n, positions)
        energy = _reduce(side, name, neighbor, weight.reshape(shape), backend)
        return [_scaled(side, name, energy, scale, (n, fine), backend)]
    energy = _reduce(side, name, neighbor, weight, backend)
    energy = _scaled(side, name, energy, scale, (fine,), backend).reshape(n, positions)
    return [energy[:, position] for position in range(positions)]


def _scaled(
    side: Side, name: str, energy: Any, scale: Any, lengths: tuple[int, ...], backend: Backend
) -> Any:
    """Energy times the squared scale, one factor per channel."""
    if scale is None:
        return energy
    where = f"{name}.scale"
    factor = backend.as_float64(scale, where)
    check.vector(side.function, where, tuple(factor.shape), lengths, "shared channel")
    return energy * (factor * factor)


def _no_meeting(side: Side, name: str, neighbor: Neighbor, c: int) -> str:
    shape = tuple(neighbor.weight.shape)
    by_row = side.producer != neighbor.transposed
    groups = f" * {neighbor.groups} groups" if neighbor.groups > 1 else ""
    mine = f"{name}.shape[0]" if by_row else f"{name}.shape[1]{groups}"
    why = "its outputs feed w's inputs" if side.producer else "it reads w's outputs"
    return (
        f"{side.function}: expected {mine} == {side.w_channels} ({why}), got {name} "
        f"{list(shape)} and w {list(side.w_shape)}, that is {c} and {side.channels} channels. "
        f"{_cure(side, name, neighbor, c)}"
    )


def _cure(side: Side, name: str, neighbor: Neighbor, c: int) -> str:
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
    return f"Check that {name} is the layer next to w."
