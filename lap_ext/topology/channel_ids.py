# SPDX-License-Identifier: MIT
"""Channel ids of a tensor: which channel each of its elements belongs to.

A channel id is the number of a channel (channels.py); 0 is none: a constant, an index, a mask. The
ids of a tensor are an int64 tensor of the same rank, with size 1 along every dimension in which the
channel does not change: [1, C, 1, 1] for the output of a convolution, whatever its batch and image.
Operations that only move data are applied to the ids themselves, so that no rule can get their
indices wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = Sequence[int]


def none(rank: int) -> Tensor:
    """Returns the ids of a tensor without channels."""
    return torch.zeros([1] * rank, dtype=torch.int64)


def compressed(ids: Tensor) -> Tensor:
    """Reduces every dimension in which the ids do not change to size 1.

    Example:
        >>> compressed(torch.tensor([[5, 6], [5, 6]]))
        tensor([[5, 6]])
    """
    if ids.numel() == 0:
        return none(ids.dim())
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if ids.stride(dim) == 0 or bool((ids == first).all()):
                ids = first
    return ids.contiguous()


def reshaped(ids: Tensor, shape: Shape, new_shape: Shape) -> Tensor:
    """Returns the ids of x.reshape(new_shape) for x of this shape.

    Dimensions are matched in groups of equal size; only groups in which ids change are expanded.

    Example:
        >>> reshaped(torch.tensor([[[1], [2]]]), (8, 2, 3), (8, 6))     # channel-major flatten
        tensor([[1, 1, 1, 2, 2, 2]])
    """
    if 0 in shape:
        return none(len(new_shape))
    sizes: list[int] = []  # of the ids: 1 where a group does not change
    result: list[int] = []
    for old, new in matched(list(shape), list(new_shape)):
        changing = any(ids.shape[dim] > 1 for dim in old)
        sizes += [shape[dim] if changing else 1 for dim in old]
        result += [new_shape[dim] if changing else 1 for dim in new]
    return compressed(ids.expand(sizes).reshape(result))


def matched(shape: list[int], new_shape: list[int]) -> list[tuple[list[int], list[int]]]:
    """Matches the smallest groups of adjacent dimensions of both shapes with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    old = new = 0
    while old < len(shape) or new < len(new_shape):
        a: list[int] = []
        b: list[int] = []
        left, right = 1, 1
        while True:
            if left <= right and old < len(shape) and (left < right or not a):
                left *= shape[old]
                a.append(old)
                old += 1
            elif new < len(new_shape) and (right < left or not b):
                right *= new_shape[new]
                b.append(new)
                new += 1
            if left == right and (a or b):
                break
            if (left < right and old >= len(shape)) or (right < left and new >= len(new_shape)):
                break
        groups.append((a, b))
    return groups


def broadcast(ids: Tensor, rank: int) -> Tensor:
    """Returns the ids of a tensor broadcast to a higher rank."""
    more = rank - ids.dim()
    return ids.reshape([1] * more + list(ids.shape)) if more else ids


def pairs_along(ids: Tensor, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns all (index along dim, id) that occur, without id 0: two int64 vectors.

    Example:
        >>> pairs_along(torch.tensor([[7, 8]]), 1, 2)
        (tensor([0, 1]), tensor([7, 8]))
    """
    if ids.numel() == 0:  # a layer without outputs before it
        return torch.arange(0), torch.arange(0)
    across = ids.movedim(dim, 0).reshape(ids.shape[dim], -1)  # [size or 1, rest]
    index = torch.arange(size)
    if across.shape[1] == 1:
        along = across[:, 0].expand(size)
        return index[along != 0], along[along != 0]
    base = int(across.max()) + 1
    keys = torch.unique(index[:, None] * base + across.expand(size, -1))
    index, along = keys // base, keys % base
    return index[along != 0], along[along != 0]


def unique_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the distinct pairs of two broadcast tensors of ids.

    Returns:
        (ids of a [n], ids of b [n], index of each element's pair in the broadcast shape).
    """
    base = int(b.max()) + 1
    keys, inverse = torch.unique(a * base + b, return_inverse=True)
    return keys // base, keys % base, inverse
