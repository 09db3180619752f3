# SPDX-License-Identifier: MIT
"""Equality of results, checked before anything is timed. A wrong result ends the run.

Our mask must be the definition's, to the bit: exactly keep, the largest scores, of equal ones the
lower index. A baseline computes its norms in float32 and breaks ties as it likes: it may differ
from ours only at scores within TOLERANCE of the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines

TOLERANCE = 1e-5  # relative; float32 norms of some million squares


class WrongResultError(Exception):
    """A result that is not what the definition says."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise WrongResultError(text)


def is_top(
    masks: Sequence[Tensor], scores: Sequence[Tensor], keep: int, eligible: Tensor | None = None
) -> float:
    """Checks that masks name exactly the keep first of all scores >= 0; returns the threshold."""
    mask = torch.cat([m.flatten() for m in masks])
    score = torch.cat([s.flatten() for s in scores])
    if eligible is not None:
        score = score.masked_fill(~eligible.flatten(), -1.0)
    count = int(mask.count_nonzero())
    require(count == keep, f"expected {keep} kept, got {count}")
    threshold = score.masked_fill(~mask, torch.inf).min()
    above = score > threshold
    require(bool((above <= mask).all()), "a score above the threshold is not kept")
    ties = mask[score == threshold]  # in order of index
    first = keep - int(above.count_nonzero())
    require(bool(ties[:first].all()) and not bool(ties[first:].any()), "ties not by lower index")
    return float(threshold)


def same_choice(
    scores: Sequence[Tensor], threshold: float, extra: int | None
) -> Callable[[Any, Any], None]:
    """Makes a check that a baseline keeps what we keep, but for scores at the threshold.

    extra: how many more or fewer it may keep; None: as many as tie.
    """

    def check(ours: Any, theirs: Any) -> None:
        difference = 0
        for mine, baseline, score in zip(
            baselines.as_masks(ours), baselines.as_masks(theirs), scores, strict=True
        ):
            difference += int(baseline.count_nonzero()) - int(mine.count_nonzero())
            off = (score[mine ^ baseline] - threshold).abs()
            far = float(off.max()) if off.numel() else 0.0
            require(far <= TOLERANCE * threshold, f"kept scores differ by {far:g} at {threshold:g}")
        require(
            extra is None or abs(difference) <= extra,
            f"the baseline keeps {difference:+d}, expected at most {extra} more or fewer",
        )

    return check


def close(ours: Tensor, theirs: Tensor) -> None:
    """Checks that scores agree with a baseline's float32 formula."""
    require(
        torch.allclose(ours, theirs, rtol=TOLERANCE, atol=0.0),
        "scores differ from the eager formula",
    )


def equal(ours: Any, theirs: Any) -> None:
    """Checks for the same bits: two masks, two lists of masks, or two values."""
    pairs = zip(_tensors(ours), _tensors(theirs), strict=True)
    require(all(torch.equal(a, b) for a, b in pairs), "results differ")


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)
