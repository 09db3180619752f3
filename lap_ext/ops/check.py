# SPDX-License-Identifier: MIT
"""Framework-free checks: they see shapes, dtype names and numbers, never tensors.

Every message follows one template and speaks in the names of the function the user called:

    <function>: expected <rule> (<why>), got <values>. <cure>.

Wrong values and shapes raise ValueError, wrong types and dtypes TypeError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import SupportsIndex

Shape = Sequence[int]
Number = float | Fraction | Decimal  # a sparsity; int counts as float

FLOATS = ("float32", "float64", "float16", "bfloat16")
_PERCENT = 100
_MORE_THAN_MEMORY = 1 << 62  # elements: operators take 64-bit integers


def keep_count(function: str, sparsity: Number | None, keep: SupportsIndex | None, n: int) -> int:
    """Number of weights to keep, of n, from exactly one of sparsity and keep.

        keep = floor((1 - sparsity) * n + 1/2)

    in integers, without rounding error: the number given is taken for exactly what it is. 0.9 is
    the double nearest to 0.9, which is a little more than 9/10; Fraction(9, 10) and Decimal("0.9")
    are 9/10. A keep above n means all.

    Example:
        >>> keep_count("mask", 0.5, None, 5), keep_count("mask", None, 7, 5)  # floor(2.5 + 0.5)
        (3, 7)
    """
    if (sparsity is None) == (keep is None):
        given = "neither" if keep is None else f"sparsity={sparsity} and keep={keep}"
        raise ValueError(
            f"{function}: expected either sparsity (the fraction removed) or keep (the number "
            f"kept), got {given}. Pass exactly one."
        )
    if keep is not None:
        count = _keep(function, keep)
        return count if count < _MORE_THAN_MEMORY else n
    assert sparsity is not None
    if isinstance(sparsity, float):
        sparsity = float(sparsity)  # under torch.compile this makes a symbol a number
    elif not _is_number(sparsity):
        raise TypeError(
            f"{function}: expected sparsity to be a number (the fraction removed), "
            f"got {type(sparsity).__name__}."
        )
    if sparsity != sparsity or not 0 <= sparsity <= 1:  # noqa: PLR0124 (a NaN of any number type)
        raise ValueError(
            f"{function}: expected 0 <= sparsity <= 1 (the fraction removed), got {sparsity}."
            f"{_did_you_mean(sparsity)}"
        )
    above, below = sparsity.as_integer_ratio()
    return (2 * (below - above) * n + below) // (2 * below)


def _is_number(x: object) -> bool:
    return hasattr(x, "as_integer_ratio") and not isinstance(x, bool)


def _keep(function: str, keep: SupportsIndex) -> int:
    if isinstance(keep, bool) or not hasattr(keep, "__index__"):
        raise TypeError(
            f"{function}: expected keep to be an integer (the number kept), "
            f"got {type(keep).__name__}."
        )
    count = keep if isinstance(keep, int) else operator.index(keep)
    if count < 0:
        raise ValueError(f"{function}: expected keep >= 0 (the number kept), got {count}.")
    return count


def _did_you_mean(sparsity: Number) -> str:
    if sparsity != sparsity or not 1 < sparsity <= _PERCENT:  # noqa: PLR0124
        return ""
    fraction = float(sparsity) / _PERCENT
    text = f"{fraction:.2f}"
    return f" Did you mean {text if math.isclose(float(text), fraction) else f'{fraction:g}'}?"


def rank(function: str, k: SupportsIndex, n: int) -> int:
    """K as an int with 1 <= k <= n."""
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(
            f"{function}: expected k to be an integer (1 is the largest score), "
            f"got {type(k).__name__}."
        )
    count = k if isinstance(k, int) else operator.index(k)
    if n == 0:
        raise ValueError(f"{function}: expected scores with one element or more, got none.")
    if not 1 <= count <= n:
        raise ValueError(
            f"{function}: expected 1 <= k <= {n} (k counts from the largest of all {n} scores), "
            f"got k={count}."
        )
    return count


def floating(function: str, name: str, dtype: str) -> None:
    """Dtype (as the framework spells it, torch.int8 or int8) is one lap_ext computes with."""
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
    raise TypeError(
        f"{function}: expected {article}floating-point {name} (float32, float64, float16 or "
        f"bfloat16), "
        f"got {dtype}. {cure}"
    )


def one_of_a_kind(function: str, what: str, kinds: Sequence[str]) -> None:
    """All scores share one dtype (or one device): they enter one ranking."""
    for t, kind in enumerate(kinds):
        if kind != kinds[0]:
            error = TypeError if what == "dtype" else ValueError
            raise error(
                f"{function}: expected all scores to share one {what} (they are ranked together), "
                f"got {kinds[0]} for scores[0] and {kind} for scores[{t}]. "
                "Move or convert them first."
            )


def same_device(function: str, name: str, device: str, w_name: str, w_device: str) -> None:
    """Every tensor lies where w lies."""
    if device != w_device:
        raise ValueError(
            f"{function}: expected {name} and {w_name} on one device, got {name} on {device} and "
            f"{w_name} on {w_device}. Move one of them first."
        )


def mask_like(function: str, name: str, dtype: str, shape: Shape, like: str, wanted: Shape) -> None:
    """A mask is bool and has the shape of what it masks."""
    if dtype.rpartition(".")[2] != "bool":
        raise TypeError(
            f"{function}: expected a bool {name} (True: may be kept), got {dtype}. "
            f"Pass {name} != 0."
        )
    if tuple(shape) != tuple(wanted):
        raise ValueError(
            f"{function}: expected {name}.shape == {like}.shape (one flag per weight), "
            f"got {name} {list(shape)} and {like} {list(wanted)}."
        )


def one_mask_each(function: str, mask: object, count: int) -> None:
    """A list of scores takes a list of masks, none of them missing."""
    if not isinstance(mask, (list, tuple)) or any(m is None for m in mask):
        raise TypeError(
            f"{function}: expected mask to be a list of bool masks, one per tensor of scores, "
            f"got {type(mask).__name__}{' with None' if isinstance(mask, (list, tuple)) else ''}."
        )
    if len(mask) != count:
        raise ValueError(
            f"{function}: expected one mask per tensor of scores, got {len(mask)} masks for "
            f"{count} tensors."
        )


def layer_channels(
    function: str, name: str, shape: Shape, groups: int, transposed: bool
) -> tuple[int, int]:
    """(input channels, output channels) of a weight.

    [O, I / groups, *K]; transposed [I, O / groups, *K].
    """
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(
            f"{function}: expected groups of {name} to be an int, got {type(groups).__name__}."
        )
    if len(shape) < 2:
        layout = "[I, O / groups, *K]" if transposed else "[O, I / groups, *K]"
        raise ValueError(
            f"{function}: expected {name} with 2 dimensions or more ({layout}), got {list(shape)}."
            f"{' Pass weight[None] or weight[:, None].' if len(shape) == 1 else ''}"
        )
    if groups < 1 or shape[0] % groups:
        raise ValueError(
            f"{function}: expected groups >= 1 that divides {name}.shape[0], "
            f"got groups={groups} and {name} {list(shape)}."
        )
    rows, cols = shape[0], shape[1] * groups
    return (rows, cols) if transposed else (cols, rows)


def vector(function: str, name: str, shape: Shape, lengths: Sequence[int], per: str) -> None:
    """A factor is a vector with one entry per channel."""
    if len(shape) != 1 or shape[0] not in lengths:
        wanted = " or ".join(f"[{length}]" for length in dict.fromkeys(lengths))
        raise ValueError(
            f"{function}: expected {name} {wanted} (one entry per {per}), got {list(shape)}."
        )


def may_overlap(shape: Shape, strides: Sequence[int]) -> bool:
    """Whether two elements may share memory (a sufficient test for views that do not).

    Example:
        >>> may_overlap([2, 3], [1, 2]), may_overlap([2, 3], [0, 1])  # transposed; expanded
        (False, True)
    """
    if 0 in shape:
        return False
    reach = 0  # the farthest element of the dimensions seen so far
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def renamed(function: str, error: Exception) -> Exception | None:
    """An error of a kernel ("<op>: expected ...") in the name of the function the user called.

    None if it is another error.
    """
    _, found, rest = str(error).partition(": expected ")
    return type(error)(f"{function}{found}{rest}") if found else None


def in_layer(function: str, layer: str, error: Exception) -> Exception | None:
    """An error about one layer's tensors, in the name of a function of whole models.

    None if it is another error.
    """
    _, found, rest = str(error).partition(": expected ")
    if not found:
        return None
    rest = rest.replace(" in w,", f" in layer {layer!r},")
    rest = rest.replace(", or pass check_finite=False to rank them as they come", "")
    said = str(error).startswith(f"{function}: ") or repr(layer) in rest
    if not said:
        rest = f"{rest} (layer {layer!r})"
    return type(error)(f"{function}{found}{rest}")


def not_finite_scale(function: str, name: str, value: float, index: int) -> str:
    """Message: a scale is inf or NaN."""
    return f"{function}: expected finite entries in {name}, got {value} at index {index}."


def lost_norm(function: str, name: str) -> str:
    """Message: squares were finite until they were scaled or added."""
    return (
        f"{function}: expected squared norms within float64's range from {name}, got one that "
        "leaves it when scaled or added. Multiply the neighbors by a power of two; a common factor "
        "changes no mask."
    )


def writable(function: str, name: str, shape: Shape, strides: Sequence[int]) -> None:
    """Each element of the tensor to change has its own place in memory."""
    if may_overlap(shape, strides):
        raise ValueError(
            f"{function}: expected {name} whose elements do not share memory (it is changed in "
            f"place), got shape {list(shape)} with strides {list(strides)}. Make a contiguous "
            "copy first."
        )


def one_of(function: str, name: str, value: object, known: Sequence[str]) -> None:
    """An option is one of the words it can be."""
    if value not in known:
        words = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise ValueError(f"{function}: expected {name} to be {words}, got {value!r}.")


def positive(function: str, name: str, value: object) -> None:
    """A count is an integer from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{function}: expected {name} to be an integer, got {type(value).__name__}."
        )
    if value < 1:
        raise ValueError(f"{function}: expected {name} >= 1, got {value}.")
