# SPDX-License-Identifier: MIT
"""Channel labels of a tensor: which channel each of its elements belongs to.

A label is the number of a channel (channels.py); 0 is none: a constant, an index, a mask. Labels
are an int64 tensor of the rank of what they label, with size 1 along every dimension in which the
channel does not change: [1, C, 1, 1] for the output of a convolution, whatever its batch and image.
Operations that only move data are run on the labels themselves, so that no rule can get their
indices wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = Sequence[int]


def none(rank: int) -> Tensor:
    """Labels of a tensor without channels."""
    return torch.zeros([1] * rank, dtype=torch.int64)


def compressed(labels: Tensor) -> Tensor:
    """The same labels with size 1 along every dimension in which they do not change.

    Example:
        >>> compressed(torch.tensor([[5, 6], [5, 6]]))
        tensor([[5, 6]])
    """
    if labels.numel() == 0:
        return none(labels.dim())
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels.contiguous()


def reshaped(labels: Tensor, shape: Shape, new_shape: Shape) -> Tensor:
    """Labels of x.reshape(new_shape) for x of this shape.

    Dimensions are matched in blocks of equal size; only blocks in which labels change are laid out.

    Example:
        >>> reshaped(torch.tensor([[[1], [2]]]), (8, 2, 3), (8, 6))     # channel-major flatten
        tensor([[1, 1, 1, 2, 2, 2]])
    """
    if 0 in shape:
        return none(len(new_shape))
    sizes: list[int] = []  # of labels, block by block, all of a changing block
    result: list[int] = []
    for old, new in _blocks(list(shape), list(new_shape)):
        changing = any(labels.shape[dim] > 1 for dim in old)
        sizes += [shape[dim] if changing else 1 for dim in old]
        result += [new_shape[dim] if changing else 1 for dim in new]
    return compressed(labels.expand(sizes).reshape(result))


def _blocks(shape: list[int], new_shape: list[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of both shapes with equal products, as lists of dimensions."""
    blocks: list[tuple[list[int], list[int]]] = []
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
        blocks.append((a, b))
    return blocks


def broadcast(labels: Tensor, rank: int) -> Tensor:
    """Labels of a tensor broadcast to a higher rank."""
    more = rank - labels.dim()
    return labels.reshape([1] * more + list(labels.shape)) if more else labels


def pairs_along(labels: Tensor, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """All (index along dim, label) that occur, without label 0: two int64 vectors.

    Example:
        >>> pairs_along(torch.tensor([[7, 8]]), 1, 2)
        (tensor([0, 1]), tensor([7, 8]))
    """
    across = labels.movedim(dim, 0).reshape(labels.shape[dim], -1)  # [size or 1, rest]
    index = torch.arange(size)
    if across.shape[1] == 1:
        found = across[:, 0].expand(size)
        return index[found != 0], found[found != 0]
    keys = index[:, None] * (int(across.max()) + 1) + across.expand(size, -1)
    keys = torch.unique(keys)
    index, found = keys // (int(across.max()) + 1), keys % (int(across.max()) + 1)
    return index[found != 0], found[found != 0]


def unique_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct pairs of two broadcast label tensors.

    Returns:
        (labels of a [n], labels of b [n], index of the pair, broadcast shape).
    """
    base = int(b.max()) + 1
    keys, inverse = torch.unique(a * base + b, return_inverse=True)
    return keys // base, keys % base, inverse
