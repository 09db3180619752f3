# SPDX-License-Identifier: MIT
"""Checks of arguments without a framework: they see shapes, dtype names and numbers, never tensors.

Errors call arguments by the names that they have in the function that the user called. Wrong
values and shapes raise LapValueError, wrong types and dtypes LapTypeError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import SupportsIndex

from lap_ext.errors import LapTypeError, LapValueError

Shape = Sequence[int]
Number = float | Fraction | Decimal  # a sparsity; int counts as float

FLOATS = ("float32", "float64", "float16", "bfloat16")
_PERCENT = 100
_MORE_THAN_MEMORY = 1 << 62  # elements: operators take 64-bit integers


def keep_count(
    sparsity: Number | None, keep: SupportsIndex | None, n: int, *, argument: str = "sparsity"
) -> int:
    """Counts the weights to keep, of n, from exactly one of sparsity and keep.

        keep = floor((1 - sparsity) * n + 1/2)

    in integers, without rounding error: the number given is taken for exactly what it is. 0.9 is
    the double nearest to 0.9, which is a little more than 9/10; Fraction(9, 10) and Decimal("0.9")
    are 9/10. A keep above n means all.

    Example:
        >>> keep_count(0.5, None, 5), keep_count(None, 7, 5)  # floor(2.5 + 0.5)
        (3, 7)
    """
    if (sparsity is None) == (keep is None):
        given = "neither" if keep is None else f"sparsity={sparsity} and keep={keep}"
        raise LapValueError(
            "either sparsity (the fraction removed) or keep (the number kept)",
            given,
            "Pass exactly one.",
        )
    if keep is not None:
        count = _keep(keep)
        return count if count < _MORE_THAN_MEMORY else n
    assert sparsity is not None
    if isinstance(sparsity, float):
        sparsity = float(sparsity)  # under torch.compile this makes a symbol a number
    elif not _is_number(sparsity):
        raise LapTypeError(
            "{argument} to be a number (the fraction removed)",
            type(sparsity).__name__,
            argument=argument,
        )
    if sparsity != sparsity or not 0 <= sparsity <= 1:  # noqa: PLR0124 (a NaN of any number type)
        raise LapValueError(
            "0 <= {argument} <= 1 (the fraction removed)",
            sparsity,
            _did_you_mean(sparsity),
            argument=argument,
        )
    above, below = sparsity.as_integer_ratio()
    return (2 * (below - above) * n + below) // (2 * below)


def _is_number(x: object) -> bool:
    return hasattr(x, "as_integer_ratio") and not isinstance(x, bool)


def _keep(keep: SupportsIndex) -> int:
    if isinstance(keep, bool) or not hasattr(keep, "__index__"):
        raise LapTypeError(
            "{argument} to be an integer (the number kept)", type(keep).__name__, argument="keep"
        )
    count = keep if isinstance(keep, int) else operator.index(keep)
    if count < 0:
        raise LapValueError("{argument} >= 0 (the number kept)", count, argument="keep")
    return count


def _did_you_mean(sparsity: Number) -> str:
    if sparsity != sparsity or not 1 < sparsity <= _PERCENT:  # noqa: PLR0124
        return ""
    fraction = float(sparsity) / _PERCENT
    text = f"{fraction:.2f}"
    return f"Did you mean {text if math.isclose(float(text), fraction) else f'{fraction:g}'}?"


def rank(k: SupportsIndex, n: int) -> int:
    """Checks a rank: an int with 1 <= k <= n."""
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise LapTypeError(
            "{argument} to be an integer (1 is the largest score)", type(k).__name__, argument="k"
        )
    count = k if isinstance(k, int) else operator.index(k)
    if n == 0:
        raise LapValueError("scores with one element or more", "none")
    if not 1 <= count <= n:
        raise LapValueError(
            f"1 <= {{argument}} <= {n} ({{argument}} counts from the largest of all {n} scores)",
            f"{{argument}}={count}",
            argument="k",
        )
    return count


def floating(name: str, dtype: str) -> None:
    """Checks that lap_ext computes with a dtype, spelled as by its framework (torch.int8, int8)."""
    short = dtype.rpartition(".")[2]
    if short in FLOATS:
        return
    cure = "Dequantize first."
    if "complex" in short:
        cure = "Pass its magnitude."
    elif "float" in short:
        cure = "Convert it to float32 first."
    elif name.startswith("scores"):
        cure = "Convert to a floating-point dtype first."
    article = "" if name == "scores" else "a "
    raise LapTypeError(
        f"{article}floating-point {{argument}} (float32, float64, float16 or bfloat16)",
        dtype,
        cure,
        argument=name,
    )


def one_of_a_kind(what: str, kinds: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Checks that all scores share one dtype (or one device): they are ranked together."""
    for t, kind in enumerate(kinds):
        if kind != kinds[0]:
            first, second = (f"scores[{i}]" if names is None else names[i] for i in (0, t))
            error = LapTypeError if what == "dtype" else LapValueError
            raise error(
                f"all scores to share one {what} (they are ranked together)",
                f"{kinds[0]} for {first} and {kind} for {second}",
                "Move or convert them first.",
            )


def same_device(name: str, device: str, w_name: str, w_device: str) -> None:
    """Checks that a tensor is on the device of w."""
    if device != w_device:
        raise LapValueError(
            f"{{argument}} and {w_name} on one device",
            f"{{argument}} on {device} and {w_name} on {w_device}",
            "Move one of them first.",
            argument=name,
        )


def mask_like(name: str, dtype: str, shape: Shape, like: str, wanted: Shape) -> None:
    """Checks that a mask is bool and has the shape of what it masks."""
    if dtype.rpartition(".")[2] != "bool":
        raise LapTypeError(
            "a bool {argument} (True: may be kept)", dtype, "Pass {argument} != 0.", argument=name
        )
    if tuple(shape) != tuple(wanted):
        raise LapValueError(
            f"{{argument}}.shape == {like}.shape (one flag per weight)",
            f"{{argument}} {list(shape)} and {like} {list(wanted)}",
            argument=name,
        )


def one_mask_each(mask: object, count: int) -> None:
    """Checks that a list of scores has a list of masks, none of them missing."""
    if not isinstance(mask, (list, tuple)) or any(m is None for m in mask):
        raise LapTypeError(
            "{argument} to be a list of bool masks, one per tensor of scores",
            f"{type(mask).__name__}{' with None' if isinstance(mask, (list, tuple)) else ''}",
            argument="mask",
        )
    if len(mask) != count:
        raise LapValueError(
            "one mask per tensor of scores",
            f"{len(mask)} masks for {count} tensors",
            argument="mask",
        )


def layer_channels(name: str, shape: Shape, groups: int, transposed: bool) -> tuple[int, int]:
    """Counts the (input channels, output channels) of a weight, after checking its shape.

    [O, I / groups, *K]; transposed [I, O / groups, *K].
    """
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise LapTypeError(
            "groups of {argument} to be an int", type(groups).__name__, argument=name
        )
    if len(shape) < 2:
        layout = "[I, O / groups, *K]" if transposed else "[O, I / groups, *K]"
        raise LapValueError(
            f"{{argument}} with 2 dimensions or more ({layout})",
            list(shape),
            "Pass weight[None] or weight[:, None]." if len(shape) == 1 else "",
            argument=name,
        )
    if groups < 1 or shape[0] % groups:
        raise LapValueError(
            "groups >= 1 that divides {argument}.shape[0]",
            f"groups={groups} and {{argument}} {list(shape)}",
            argument=name,
        )
    rows, cols = shape[0], shape[1] * groups
    return (rows, cols) if transposed else (cols, rows)


def vector(name: str, shape: Shape, lengths: Sequence[int], per: str) -> None:
    """Checks that norms are a vector with one entry per channel."""
    if len(shape) != 1 or shape[0] not in lengths:
        wanted = " or ".join(f"[{length}]" for length in dict.fromkeys(lengths))
        raise LapValueError(
            f"{{argument}} {wanted} (one entry per {per})", list(shape), argument=name
        )


def may_overlap(shape: Shape, strides: Sequence[int]) -> bool:
    """Tells whether two elements may share memory; False is certain, True is not.

    Example:
        >>> may_overlap([2, 3], [1, 2]), may_overlap([2, 3], [0, 1])  # transposed; expanded
        (False, True)
    """
    if 0 in shape:
        return False
    reach = 0  # offset of the farthest element of the dimensions so far
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def not_finite_scale(name: str, value: float, index: int) -> LapValueError:
    """Makes the error about a scale that is inf or NaN."""
    return LapValueError("finite entries in {argument}", f"{value} at index {index}", argument=name)


def lost_norm(name: str) -> LapValueError:
    """Makes the error about squares that were finite until they were scaled or added."""
    return LapValueError(
        "squared norms within float64's range from {argument}",
        "one that leaves it when scaled or added",
        "Multiply the neighbors by a power of two; a common factor changes no mask.",
        argument=name,
    )


def writable(name: str, shape: Shape, strides: Sequence[int]) -> None:
    """Checks that no two elements of a tensor that is to be changed share memory."""
    if may_overlap(shape, strides):
        raise LapValueError(
            "{argument} whose elements do not share memory (it is changed in place)",
            f"shape {list(shape)} with strides {list(strides)}",
            "Make a contiguous copy first.",
            argument=name,
        )
