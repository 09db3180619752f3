# SPDX-License-Identifier: MIT
"""Makes the factors of Gram matrices over a weight's channels of the neighbors that it has.

    A = sum over consumers of (W_n D)^T (W_n D)       D: the scale of each channel in between
    B = sum over producers of (D W_p) (D W_p)^T

A factor is one neighbor's part, W_n D or D W_p, whose rows belong to the channels; exact.py says
what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lap_ext.ops import check
from lap_ext.ops.neighbors import Neighbor, Side, listed, meeting, side_of
from lap_ext.ops.reference.common import require_finite
from lap_ext.ops.torch_args import TorchBackend


@dataclass(frozen=True, eq=False)
class Factor:
    """One neighbor's part of a Gram matrix over the channels of a weight's inputs or outputs.

        row[c] = scale[c] * matrix[of[c]]
        gram[c, c'] = <row[c], row[c']> if apart[c] == apart[c'], else 0

    Attributes:
        matrix: float [n, J]: a neighbor's weight, one row per channel that it shares.
        of: int64 [channels]; None: row c of the matrix is that of channel c.
        scale: float64 [channels]; None: ones.
        apart: int64 [channels], numbers of what never meets (groups, positions); None: all meet.

    Example:
        >>> Factor(torch.tensor([[3., 4.]]), torch.tensor([0, 0]), torch.tensor([1., -2.])).gram()
        tensor([[ 25., -50.],
                [-50., 100.]], dtype=torch.float64)
    """

    matrix: Tensor
    of: Tensor | None = None
    scale: Tensor | None = None
    apart: Tensor | None = None

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.matrix.shape[0] if self.of is None else self.of.shape[0]

    @property
    def width(self) -> int:
        """The length of a row."""
        return self.matrix.shape[1]

    def rows(self, index: Tensor, columns: slice = slice(None)) -> Tensor:
        """Returns the rows of channels, float64 [*index, columns]; zeros where the index is -1."""
        there = index.clamp(min=0)
        of = there if self.of is None else self.of[there]
        rows = self.matrix[:, columns][of].to(torch.float64)
        factor = (index >= 0).to(torch.float64)
        return rows * (factor if self.scale is None else factor * self.scale[there])[..., None]

    def to(self, device: torch.device) -> Factor:
        """Returns the factor on a device."""
        of, scale, apart = (
            None if x is None else x.to(device) for x in (self.of, self.scale, self.apart)
        )
        return Factor(self.matrix.to(device), of, scale, apart)

    def placed(self, first: int, channels: int) -> Factor:
        """Returns the factor as one of more channels: own ones from first on, zero rows elsewhere.

        Example:
            >>> Factor(torch.tensor([[3., 4.]])).placed(1, 3).gram()
            tensor([[ 0.,  0.,  0.],
                    [ 0., 25.,  0.],
                    [ 0.,  0.,  0.]], dtype=torch.float64)
        """
        own = torch.arange(self.channels, device=self.matrix.device)

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(channels).index_copy_(0, own + first, x)

        scale = torch.ones_like(own, dtype=torch.float64) if self.scale is None else self.scale
        return Factor(
            self.matrix,
            spread(own if self.of is None else self.of),
            spread(scale),
            None if self.apart is None else spread(self.apart),
        )

    def gram(self) -> Tensor:
        """Computes the matrix of all channels, float64 [channels, channels]."""
        rows = self.rows(torch.arange(self.channels, device=self.matrix.device))
        gram = rows @ rows.mT
        return gram if self.apart is None else gram * (self.apart[:, None] == self.apart)


def neighbor_matrices(
    w_prev: Any,
    w: Tensor,
    w_next: Any,
    groups: int,
    transposed: bool,
    check_finite: bool = True,
) -> tuple[list[Factor] | None, list[Factor] | None]:
    """Makes (producers, consumers) of the neighbors that `lap_ext.mask` takes.

    Across a flatten, position k of a channel meets position k of the others.

    Args:
        w_prev: None, a weight, a Neighbor, or a list of these.
        w: weight [O, I / groups, *K], or [I, O / groups, *K] if transposed.
        w_next: with the same choices as w_prev.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution.
        check_finite: whether to raise an error if a neighbor's weight is inf or NaN.
    """
    backend = TorchBackend(w, check_finite)

    def factors(name: str, neighbors: Any) -> list[Factor] | None:
        if neighbors is None:
            return None
        side = side_of(name, tuple(w.shape), groups, transposed)
        found = [_factors_of(side, *each, backend) for each in listed(side, neighbors)]
        return [factor for some in found for factor in some]

    return factors("w_prev", w_prev), factors("w_next", w_next)


def by_channel(weight: Tensor, groups: int, rows: bool) -> tuple[Tensor, Tensor | None]:
    """Returns a weight as one row per channel, and each channel's group (None: there is one).

    Args:
        weight: [R, C, *K].
        groups: of its rows.
        rows: whether the channels are its rows, else its columns.

    Example:
        >>> by_channel(torch.tensor([[1., 2.], [3., 4.]]), groups=2, rows=False)
        (tensor([[1.],
                [2.],
                [3.],
                [4.]]), tensor([0, 0, 1, 1]))
    """
    r, c = weight.shape[:2]
    if rows:
        matrix, per_group = weight.reshape(r, -1), r // groups
    else:
        cut = weight.reshape(groups, r // groups, c, -1).permute(0, 2, 1, 3)
        matrix, per_group = cut.reshape(groups * c, -1), c
    if groups == 1:
        return matrix, None
    return matrix, torch.arange(groups, device=weight.device).repeat_interleave(per_group)


def factors_of_pairs(
    matrix: Tensor,
    group: Tensor | None,
    here: Tensor,
    there: Tensor,
    scale: Tensor | None,
    channels: int,
) -> list[Factor]:
    """Makes factors of a neighbor's weight and the pairs of channels that meet.

    Where a channel meets several of the neighbor's, or one of the neighbor's meets several (across
    a flatten, in grouped attention), the k-th of a channel meets the k-th of the others only.

    Args:
        matrix: the neighbor's weight, [its channels, J], as `by_channel` gives it.
        group: of the neighbor's channels, which do not meet those of other groups; None: one.
        here: int64 [n], channel of w in each pair.
        there: int64 [n], channel of the neighbor in each pair.
        scale: signed factor of each pair, float64 [n]; None: ones.
        channels: of w on this side.
    """
    device = matrix.device
    here, there = here.to(device), there.to(device)
    scale = torch.ones(here.shape, dtype=torch.float64) if scale is None else scale
    turn, copy = _turns(here), _turns(there)
    parts = copy if group is None else copy * (int(group.max()) + 1) + group[there]
    result = []
    for k in range(int(turn.max()) + 1 if turn.numel() else 0):
        now = turn == k
        at = here[now]
        of = torch.zeros(channels, dtype=torch.int64, device=device).index_copy_(0, at, there[now])
        apart = torch.zeros_like(of).index_copy_(0, at, parts[now])
        factor = torch.zeros(channels, dtype=torch.float64, device=device)
        factor.index_copy_(0, at, scale.to(device)[now])
        result.append(Factor(matrix, of, factor, apart if bool(apart.any()) else None))
    return result


def unit_factor(scale: Tensor) -> Factor:
    """Makes the factor of inputs or outputs of their own, one for each channel, times a scale."""
    channels = torch.arange(scale.shape[0], device=scale.device)
    one = torch.ones(1, 1, dtype=torch.float64, device=scale.device)
    return Factor(one, torch.zeros_like(channels), scale, channels)


def _factors_of(side: Side, name: str, neighbor: Neighbor, backend: TorchBackend) -> list[Factor]:
    """Makes the factors of one neighbor, after the checks that its norms would make."""
    n, scale = side.channels, neighbor.scale
    device = backend.w.device
    if neighbor.weight is not None:
        backend.check_weight(name, neighbor.weight)
        per, times = meeting(side, name, neighbor)
    else:
        per, times = 1, 1
    fine = torch.arange(n * per, device=device)
    here, there = fine // per, fine // times
    if scale is not None:
        scale = backend.as_float64(scale, f"{name}.scale")
        sizes = {n: here, n * per // times: there}
        check.vector(f"{name}.scale", tuple(scale.shape), sorted(sizes), "shared channel")
        scale = scale[sizes[scale.shape[0]]]
    if neighbor.weight is None:
        return [unit_factor(backend.ones(n) if scale is None else scale)]
    weight = neighbor.weight.detach()
    if backend.check_finite:
        require_finite(weight, name)
    matrix, group = by_channel(weight, neighbor.groups, side.producer != neighbor.transposed)
    return factors_of_pairs(matrix, group, here, there, scale, n)


def _turns(x: Tensor) -> Tensor:
    """Counts the equal entries before each one.

    Example:
        >>> _turns(torch.tensor([5, 3, 5, 5]))
        tensor([0, 0, 1, 2])
    """
    values, order = x.sort(stable=True)
    _, count = torch.unique_consecutive(values, return_counts=True)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    turns = torch.empty_like(x)
    turns[order] = torch.arange(x.numel(), device=x.device) - first
    return turns
