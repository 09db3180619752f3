# SPDX-License-Identifier: MIT
"""Independent oracles, written from the definition; this file never imports lap_ext.

exact rank    score s = round(|w| * c), c = round(round(in) * round(out)), with 24 bits (53 for
              float64) and an unbounded exponent, as (mantissa, exponent); sort by (s desc, index).
float score   the same |w| * c, rounded once to a float with its bounded exponent.
squared norms plain Python loops in the documented order of summation; root: Python's, of each.
operators     the three layers as one dense matrix product; zero weight(s); Frobenius norm of the
              change. A convolution is unrolled by applying it to the unit vectors.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ZERO_EXPONENT = -(1 << 40)  # below the exponent of every nonzero score


# ---- exact scores and rank -------------------------------------------------------------------
class Exact(NamedTuple):
    """Nonnegative numbers m * 2**e, m in [0.5, 1) or 0, in 24 or 53 bits."""

    m: np.ndarray
    e: np.ndarray


def _normal(m: np.ndarray, e: np.ndarray) -> Exact:
    m2, shift = np.frexp(m)
    return Exact(m2, np.where(m2 == 0, ZERO_EXPONENT, e + shift))


def _rounded(x: np.ndarray, real: type) -> Exact:
    m, e = np.frexp(np.asarray(x, dtype=np.float64))
    return _normal(m.astype(real), e.astype(np.int64))


def _times(a: Exact, b: Exact) -> Exact:
    # Mantissas lie in [0.5, 1): their product can neither overflow nor underflow, so the rounding
    # of `real` is the rounding of a number with an unbounded exponent.
    return _normal(a.m * b.m, a.e + b.e)


def expand_norms(
    shape: tuple[int, ...],
    in_norm: np.ndarray,  # [I]
    out_norm: np.ndarray,  # [O]
    groups: int,
    transposed: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Expands the norms to one per weight: two arrays of `shape`."""
    r, c, *_ = np.ogrid[tuple(slice(0, n) for n in shape)]
    per_group = max(shape[0] // groups, 1)
    across = (r // per_group) * shape[1] + c  # the channel on the other side
    ins, outs = (r, across) if transposed else (across, r)
    return np.broadcast_to(in_norm[ins], shape), np.broadcast_to(out_norm[outs], shape)


def _operands(
    w: Tensor, in_norm: Tensor, out_norm: Tensor, groups: int, transposed: bool
) -> tuple[Exact, Exact]:
    """Returns |w| and the product of its two norms, both in the score's precision."""
    real = np.float64 if w.dtype == torch.float64 else np.float32
    ins, outs = expand_norms(
        tuple(w.shape), in_norm.cpu().numpy(), out_norm.cpu().numpy(), groups, transposed
    )
    weight = w.detach().cpu().double().abs().numpy()
    return _rounded(weight, real), _times(_rounded(ins, real), _rounded(outs, real))


def exact_score(
    w: Tensor,  # [O, I/g, *K], transposed: [I, O/g, *K]
    in_norm: Tensor,  # float64 [I]
    out_norm: Tensor,  # float64 [O]
    groups: int = 1,
    transposed: bool = False,
) -> Exact:
    """The score of every weight as it ranks, exponents unbounded; w's shape."""
    return _times(*_operands(w, in_norm, out_norm, groups, transposed))


def float_score(
    w: Tensor, in_norm: Tensor, out_norm: Tensor, groups: int = 1, transposed: bool = False
) -> Tensor:
    """The score as a float: the same product, rounded once; inf, denormal or 0 out of range."""
    a, b = _operands(w, in_norm, out_norm, groups, transposed)
    real, e = a.m.dtype, np.clip(a.e + b.e, -1200, 1200).astype(np.int32)
    with np.errstate(all="ignore"):
        product = np.ldexp(a.m.astype(np.float64) * b.m, e)  # float32: exact in double
        value = np.ascontiguousarray(product.astype(real))
    if real == np.float64:  # a double denormal has been rounded twice
        for index in zip(*np.nonzero((value < 2.0**-1021) & (a.m * b.m > 0)), strict=True):
            exact = Fraction(a.m[index]) * Fraction(b.m[index])
            value[index] = float(exact * Fraction(2) ** int(a.e[index] + b.e[index]))
    return torch.from_numpy(value)


def rank_order(s: Exact) -> np.ndarray:
    """Flat indices by (score desc, index asc)."""
    return np.lexsort((-s.m.reshape(-1), -s.e.reshape(-1)))  # stable: ties stay in index order


def first_of(order: np.ndarray, keep: int, shape: tuple[int, ...]) -> Tensor:
    """The mask of the first `keep` flat indices."""
    out = np.zeros(math.prod(shape), dtype=bool)
    out[order[:keep]] = True
    return torch.from_numpy(out.reshape(shape))


def rank_mask(s: Exact, keep: int, eligible: Tensor | None = None) -> Tensor:
    """The first `keep` eligible ones of (score desc, flat index asc)."""
    order = rank_order(s)
    if eligible is not None:
        order = order[eligible.cpu().numpy().reshape(-1)[order]]
    return first_of(order, keep, s.m.shape)


def rank_values(
    scores: list[Tensor], keep: int, eligible: list[Tensor] | None = None
) -> list[Tensor]:
    """rank_mask over plain signed values of several tensors as one ranking."""
    flat = np.concatenate([x.cpu().double().reshape(-1).numpy() for x in scores])
    order = np.argsort(-flat, kind="stable")  # -0.0 and 0.0 compare equal
    if eligible is not None:
        allowed = np.concatenate([x.cpu().reshape(-1).numpy() for x in eligible])
        order = order[allowed[order]]
    parts = first_of(order, keep, flat.shape).split([x.numel() for x in scores])
    return [part.reshape(x.shape) for part, x in zip(parts, scores, strict=True)]


def keep_count(sparsity: float, n: int) -> int:
    """floor((1 - sparsity) * n + 1/2) in rational arithmetic."""
    return math.floor((1 - Fraction(sparsity)) * n + Fraction(1, 2))


# ---- squared norms and roots, bit for bit ------------------------------------------------------
def root(x: Tensor) -> Tensor:
    """IEEE 754's square root of every entry (torch's on a CPU may be one ulp off)."""
    entries = [math.sqrt(e) if e >= 0 else math.nan for e in x.flatten().tolist()]
    return torch.tensor(entries, dtype=x.dtype).view(x.shape)


def row_squared_norms(weight: Tensor) -> Tensor:
    """Squared norms of the rows of [R, *rest]: segments of 1024, 32 lanes, a tree, in order."""
    squared_norms = []
    for row in weight.detach().cpu().double().reshape(weight.shape[0], -1).tolist():
        total = 0.0
        for start in range(0, len(row), 1024):
            lane = [0.0] * 32
            for j, x in enumerate(row[start : start + 1024]):
                lane[j % 32] += x * x
            for half in (16, 8, 4, 2, 1):
                for k in range(half):
                    lane[k] += lane[k + half]
            total += lane[0]
        squared_norms.append(total)
    return torch.tensor(squared_norms, dtype=torch.float64)


def col_squared_norms(weight: Tensor, groups: int = 1) -> Tensor:
    """Squared norms of the columns of [G*N, C, *K]: [G*C]; segments of 64 rows, then the window."""
    full = weight.detach().cpu().double().reshape(*weight.shape[:2], -1).tolist()
    rows, cols, squared_norms = len(full) // groups, weight.shape[1], []
    window = weight.shape[2:].numel()
    for g in range(groups):
        for c in range(cols):
            squared_norm = 0.0
            for k in range(window):
                total = 0.0
                for start in range(0, rows, 64):
                    segment = 0.0
                    for n in range(start, min(start + 64, rows)):
                        x = full[g * rows + n][c][k]
                        segment += x * x
                    total += segment
                squared_norm += total
            squared_norms.append(squared_norm)
    return torch.tensor(squared_norms, dtype=torch.float64)


# ---- the definition: distortion of a product of three operators -------------------------------
class Layer(NamedTuple):
    """One layer of the brute force; scale multiplies the channels it shares with w."""

    weight: Tensor
    groups: int = 1
    transposed: bool = False
    scale: Tensor | None = None


class Skip(NamedTuple):
    """An identity connection over the shared channels."""


def unroll(layer: Layer, size: tuple[int, ...]) -> Tensor:
    """The matrix [O * out positions, I * in positions] of a layer over an input of `size`."""
    weight = layer.weight.double()
    if weight.dim() == 2:
        return weight
    convolve = getattr(
        torch.nn.functional, f"conv{'_transpose' if layer.transposed else ''}{len(size)}d"
    )
    channels = weight.shape[0] if layer.transposed else weight.shape[1] * layer.groups
    units = torch.eye(channels * math.prod(size), dtype=torch.float64)
    out = convolve(units.reshape(-1, channels, *size), weight, groups=layer.groups)
    return out.flatten(1).T


def _source_size(layer: Layer, out: tuple[int, ...]) -> tuple[int, ...]:
    """The grid that a convolution (stride 1, no padding) needs to give `out`."""
    sign = -1 if layer.transposed else 1
    return tuple(s + sign * (k - 1) for s, k in zip(out, layer.weight.shape[2:], strict=False))


def producers(sources: list[Layer | Skip], features: int, grid: tuple[int, ...]) -> Tensor:
    """Independent producers side by side: [features = channels * positions, all their inputs]."""
    parts = []
    for source in sources or [Skip()]:
        if isinstance(source, Skip):
            parts.append(torch.eye(features, dtype=torch.float64))
            continue
        matrix = unroll(source, _source_size(source, grid))
        if source.scale is not None:
            repeats = features // source.scale.numel()
            matrix = source.scale.double().repeat_interleave(repeats)[:, None] * matrix
        parts.append(matrix)
    return torch.cat(parts, dim=1)


def consumers(sinks: list[Layer | Skip], features: int, grid: tuple[int, ...]) -> Tensor:
    """Consumers stacked: [all their outputs, features = channels * positions]."""
    parts = []
    for sink in sinks or [Skip()]:
        if isinstance(sink, Skip):
            parts.append(torch.eye(features, dtype=torch.float64))
            continue
        matrix = unroll(sink, grid)
        if sink.scale is not None:
            matrix = matrix * sink.scale.double().repeat_interleave(features // sink.scale.numel())
        parts.append(matrix)
    return torch.cat(parts, dim=0)


def _whole_filters(nonzeros: Tensor, channels: int) -> Tensor:
    """Which positions of each channel are touched by its whole filter (away from the border)."""
    per = nonzeros.reshape(channels, -1)
    return (per == per.amax(dim=1, keepdim=True)).reshape(-1)


def _positions(layer: Layer, index: int, size: tuple[int, ...]) -> Tensor:
    """Tells where the unrolled matrix holds weight number `index`."""
    one_hot = torch.zeros(layer.weight.numel(), dtype=torch.float64)
    one_hot[index] = 1
    return unroll(layer._replace(weight=one_hot.reshape(layer.weight.shape)), size) != 0


def distortions(
    before: Tensor,  # [features into w, *]
    layer: Layer,
    size: tuple[int, ...],  # the grid of w's input, () for a linear layer
    after: Tensor,  # [*, features out of w]
    channels: tuple[int, int],  # shared with the producers, with the consumers
    everywhere: bool,
) -> Tensor:
    """||after @ (M - M with zeros) @ before||_F for every weight of the middle layer, w's shape.

    Zeroed is one entry of the unrolled M, away from the border of both neighbors (nan where the
    grid has none), or, `everywhere`, all positions of the weight: that equals the score where
    the positions reach orthogonal directions, as beside a flatten with pointwise or no neighbors.
    """
    middle = unroll(layer, size)
    inside = _whole_filters((after != 0).sum(0), channels[1])[:, None]
    inside = inside & _whole_filters((before != 0).sum(1), channels[0])[None, :]
    product = after @ middle @ before
    result = torch.full((layer.weight.numel(),), math.nan, dtype=torch.float64)
    for index in range(layer.weight.numel()):
        positions = _positions(layer, index, size)
        if not everywhere:
            positions &= inside
            order = torch.arange(positions.numel()).reshape(positions.shape)
            positions &= order == positions.int().argmax()
        if positions.any():
            changed = after @ middle.masked_fill(positions, 0) @ before
            result[index] = torch.linalg.norm(product - changed)
    return result.reshape(layer.weight.shape)
