# SPDX-License-Identifier: MIT
"""Counts the multiply-adds of products that have no weight, by the channels that they multiply.

    sum over k of a[.., m, k] b[.., k, n]      one multiply-add for each (.., m, n, k)

It is one multiply-add of a channel of a with a channel of b: without either of them, there is
nothing to compute. Of q k^T, channel d of a head's queries meets channel d of its keys, once for
each pair of positions; attention weights are no channels, so that in a v only those of v count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import NamedTuple

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.value import Value, plain

Lettered = tuple[Value, str]  # an operand of an einsum


class Product(NamedTuple):
    """Multiply-adds by the pairs of channels that they multiply; id 0 is none: always there."""

    ids: Tensor  # int64 [n]
    others: Tensor  # int64 [n]
    macs: Tensor  # int64 [n], of each pair


def products_of(call: Call) -> list[Product]:
    """Lists the products of a call that uses no weight of a layer; none for other operations."""
    if call.name == "linear":
        x, w = call["input"], call["weight"]
        return [matrices(x, w if len(w.shape) == 1 else plain(w.shape[::-1]))]
    if call.name in {"mm", "matmul", "bmm", "mv", "addmm", "baddbmm"}:
        first = int(call.name in {"addmm", "baddbmm"})
        return [matrices(*call.values[first : first + 2])]
    if call.name == "einsum":
        return _einsum(call)
    if "conv" in call.name and "input" in call.arguments and "weight" in call.arguments:
        return [_convolution(call)]
    return []


def product(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Product:
    """Counts the elements of a space of these sizes by the pairs of channels that meet there.

    Example:
        >>> product(torch.tensor([[1, 2]]), torch.tensor([[3, 0]]), (7, 2))  # at 7 positions
        Product(ids=tensor([1, 2]), others=tensor([3, 0]), macs=tensor([7, 7]))
    """
    rank = len(sizes)
    left, right = channel_ids.broadcast(left, rank), channel_ids.broadcast(right, rank)
    ids, others, pair = channel_ids.unique_pairs(left, right)
    each = math.prod(n for n, changing in zip(sizes, pair.shape, strict=True) if changing == 1)
    return Product(ids, others, torch.bincount(pair.flatten(), minlength=ids.numel()) * each)


def matrices(a: Value, b: Value) -> Product:
    """Counts a [..., m, k] times b [..., k, n]; either may be a vector."""
    (a_ids, a_shape), (b_ids, b_shape) = (a.ids, a.shape), (b.ids, b.shape)
    if len(a_shape) == 1:
        a_ids, a_shape = a_ids.unsqueeze(0), (1, *a_shape)
    if len(b_shape) == 1:
        b_ids, b_shape = b_ids.unsqueeze(1), (*b_shape, 1)
    lead = torch.broadcast_shapes(a_shape[:-2], b_shape[:-2])
    return product(a_ids.unsqueeze(-1), b_ids.unsqueeze(-3), (*lead, a_shape[-2], *b_shape[-2:]))


def attention(query: Value, key: Value, value: Value) -> list[Product]:
    """Counts q k^T and a v; keys and values repeated for the heads of the queries."""
    (m, width), n = query.shape[-2:], key.shape[-2]
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    logits = product(query.ids.unsqueeze(-2), key.ids.unsqueeze(-3), (*lead, m, n, width))
    values = value.ids.unsqueeze(-3)
    return [logits, product(torch.zeros_like(values), values, (*lead, m, *value.shape[-2:]))]


def contracted(first: Lettered, second: Lettered, out: str) -> list[Product]:
    """Counts two operands of an einsum; without a letter that both sum, nothing is contracted.

    What only one of them has, and the result does not, is summed before.
    """
    a, b = first[1], second[1]
    if not any(c in b and c not in out for c in a):
        return []
    size = {c: n for v, letters in (first, second) for c, n in zip(letters, v.shape, strict=True)}
    space = [c for c in dict.fromkeys(a + b) if c in out or (c in a and c in b)]
    left, right = (_along(v.ids, letters, space) for v, letters in (first, second))
    return [product(left, right, [size[c] for c in space])]


def spelled(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Returns the letters of each operand and of the result, without "..." and with "->".

    Example:
        >>> spelled("...i, oi", [3, 2])
        (['abi', 'oi'], 'abo')
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow:
        once = sorted(c for c in inputs if c.isalpha() and inputs.count(c) == 1)
        out = ("..." if "..." in inputs else "") + "".join(once)
    more = [rank - len(x.replace("...", "")) for x, rank in zip(operands, ranks, strict=True)]
    most = max(more)
    dots = "".join(c for c in ascii_letters if c not in equation)[:most]  # met from the right
    spelled = [x.replace("...", dots[most - n :]) for x, n in zip(operands, more, strict=True)]
    return spelled, out.replace("...", dots)


def _einsum(call: Call) -> list[Product]:
    """Counts an einsum of two operands that no rule has followed: of constants."""
    values = call.values
    letters, out = spelled(call["equation"], [len(x.shape) for x in values])
    if len(values) != 2 or any(len(set(x)) != len(x) for x in letters):
        return []
    return contracted((values[0], letters[0]), (values[1], letters[1]), out)


def _along(ids: Tensor, letters: str, space: list[str]) -> Tensor:
    """Returns ids with one dimension for each letter of a space."""
    for dim, c in enumerate(letters):
        if c not in space:
            ids = ids.narrow(dim, 0, 1)
    kept = [letters.index(c) for c in space if c in letters]
    ids = ids.permute(kept + [dim for dim, c in enumerate(letters) if c not in space])
    sizes = iter(ids.shape)
    return ids.reshape([next(sizes) if c in letters else 1 for c in space])


def _convolution(call: Call) -> Product:
    """Counts a convolution with a kernel that is no layer: as much for each channel that it reads.

    It is counted as its kernel, at each position of its result, or of its input if transposed.
    """
    x, w = call["input"], call["weight"]
    transposed = "transpose" in call.name or bool(call.get("transposed", False))
    shape = x.shape if transposed else call.shape
    spatial = len(w.shape) - 2
    at = math.prod(shape) // shape[len(shape) - 1 - spatial]
    ids, others, elements = product(x.ids, channel_ids.none(len(x.shape)), x.shape)
    total = math.prod(w.shape) * at
    return Product(ids, others, elements * total // math.prod(x.shape))
