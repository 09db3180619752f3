# SPDX-License-Identifier: MIT
"""A partition of a weight that the user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lap_ext.errors import LapTypeError, LapValueError, callback
from lap_ext.structures.base import Structure

# The number of each weight's group, in the weight's shape; or the flat indices of each group.
Assignment: TypeAlias = Tensor | Sequence[Any]
_EXPECTED = "a tensor of group numbers, or a list of groups, each a list of flat indices"


@dataclass(frozen=True, eq=False)
class Groups(Structure):
    """Removes the weights of each group together, for any groups that you give.

    Of groups of equal worth, the one with the lower number is kept.

    Args:
        assignment: an integer tensor of the weight's shape that holds the number of each weight's
            group, from 0 on; or a list of groups, each the flat (C-order) indices of its weights.
            For a model: a dict from layer name to one of these (other layers stay dense), or a
            function of the layer's name and shape that returns one of them (None: stays dense). It
            is asked more than once, and must give the same each time.

    Raises:
        TypeError: assignment is none of these.
        ValueError: when a weight is pruned: its groups overlap, leave weights out or name weights
            that it has not, or a number is negative.

    Example:
        >>> import torch, lap_ext
        >>> groups = lap_ext.structures.Groups(torch.tensor([[0, 1, 0, 1]]))
        >>> lap_ext.topk_mask(torch.tensor([[3., 2., 3., 9.]]), keep=2, structure=groups)
        tensor([[False,  True, False,  True]])
        >>> groups = lap_ext.structures.Groups([[0, 3], [1, 2]])
        >>> lap_ext.topk_mask(torch.tensor([[3., 2., 3., 9.]]), keep=2, structure=groups)
        tensor([[ True, False, False,  True]])
    """

    assignment: (
        Assignment | Mapping[str, Assignment] | Callable[[str, tuple[int, ...]], Assignment | None]
    )

    def __post_init__(self) -> None:
        known = (Tensor, Sequence, Mapping)
        if isinstance(self.assignment, str) or not (
            isinstance(self.assignment, known) or callable(self.assignment)
        ):
            raise LapTypeError(
                "{argument} to be a tensor of group numbers, a list of groups, or a dict or "
                "function that gives them for each layer",
                type(self.assignment).__name__,
                argument="assignment",
            )

    @property
    def spelled(self) -> str:
        """The text "groups": the partition itself is not in it."""
        return "groups"

    def given(self, name: str | None, shape: tuple[int, ...]) -> Assignment | None:
        """Returns what is given for a layer, unchecked; None: it stays dense."""
        assignment = self.assignment
        if isinstance(assignment, Mapping):
            return None if name is None else assignment.get(name)
        if callable(assignment) and not isinstance(assignment, Tensor):
            with callback():
                return assignment(name or "", shape)
        return assignment

    def check_names(self, known: Sequence[str]) -> None:
        """Raises if a dict of groups names a layer that there is not."""
        if isinstance(self.assignment, Mapping):
            for name in self.assignment:
                if name not in known:
                    raise LapValueError("groups of the model's layers", f"some for {name!r}")

    def numbers(self, name: str | None, shape: tuple[int, ...]) -> Tensor:
        """Returns the number of each weight's group, flat, int64 on the CPU."""
        given = self.given(name, shape)
        if given is None:
            raise LapValueError(
                "groups for one weight: a tensor of its shape, or lists of flat indices",
                "a dict of layers",
            )
        if isinstance(given, Tensor):
            return _checked(given, shape)
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise LapTypeError(_EXPECTED, type(given).__name__)
        return _of_lists(given, shape)


def _checked(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Checks a tensor of group numbers."""
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise LapTypeError("integer group numbers", str(numbers.dtype))
    if tuple(numbers.shape) != shape:
        raise LapValueError(
            f"group numbers in the weight's shape {list(shape)}", list(numbers.shape)
        )
    flat = numbers.detach().cpu().long().flatten()
    if flat.numel() and int(flat.min()) < 0:
        first = int((flat < 0).to(torch.uint8).argmax())
        raise LapValueError(
            "a group, numbered from 0 on, for every weight",
            f"{int(flat[first])} at flat index {first}",
            "Exclude a layer that has none.",
        )
    if flat.numel() and int(flat.max()) >= flat.numel():
        raise LapValueError(
            f"group numbers below {flat.numel()}, the number of weights", int(flat.max())
        )
    return flat


def _indices(members: Any, number: int) -> Tensor:
    """Returns the flat indices of a group, int64 on the CPU."""
    try:
        index = torch.as_tensor(members)
    except (RuntimeError, TypeError, ValueError) as error:  # words, lists of unequal length
        raise LapTypeError(_EXPECTED, f"{type(members).__name__} as group {number}") from error
    if index.dim() == 0:
        raise LapTypeError(_EXPECTED, f"{type(members).__name__} as group {number}")
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise LapTypeError("groups of integer flat indices", str(index.dtype))
    return index.cpu().long().flatten()


def _of_lists(groups: Sequence[Any], shape: tuple[int, ...]) -> Tensor:
    """Numbers the weights by the lists that hold their flat indices."""
    count = torch.Size(shape).numel()
    numbers = torch.full((count,), -1, dtype=torch.int64)
    for number, members in enumerate(groups):
        index = _indices(members, number)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise LapValueError(
                f"flat indices from 0 to {count - 1} in group {number}",
                int(index.min()) if int(index.min()) < 0 else int(index.max()),
            )
        twice = int((numbers[index] >= 0).count_nonzero())
        if twice or torch.unique(index).numel() < index.numel():
            raise LapValueError(
                "groups that do not overlap",
                f"{max(twice, 1)} weights of group {number} in a group already",
            )
        numbers[index] = number
    left = int((numbers < 0).count_nonzero())
    if left:
        first = int((numbers < 0).to(torch.uint8).argmax())
        raise LapValueError(
            "a group for every weight",
            f"{left} without one, the first at flat index {first}",
            "Make a group of each that shall be ranked alone.",
        )
    return numbers
