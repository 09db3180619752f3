# SPDX-License-Identifier: MIT
"""Step "baselines": what else there is on the same GPU, checked to be equal, then timed.

Eager score + topk, kthvalue, sort; torch.compile of the score with topk; prune.global_unstructured;
cub's radix sort of the toolkit (cub_baseline.cu); and the two issues of PyTorch that ask for such a
selection, run again: #75599 (kthvalue is slow) and #77049 (the memory of sort).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lap_ext
from benchmarks import baselines, cases, checks
from benchmarks.gpu import cub
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import NotRunError, Save, each
from benchmarks.timing import Call, Check, Stats, Timer

BUDGET_S = 0.3
SLOW_PAIRS = 3


def run(device: Device, limit_s: float, save: Save) -> None:
    """Runs all contests, each independent of the others."""
    del limit_s  # the parent keeps it
    device.require_kernels()
    rows: list[dict[str, Any]] = []
    found = partial(_add, rows, save)
    timer = device.timer(BUDGET_S)
    contests: dict[str, Callable[[], str | None]] = {
        "eager": partial(eager, device, timer, found),
        "issue 75599": partial(issue_75599, device, timer, found),
        "issue 77049": partial(issue_77049, device, found),
        "global_unstructured": partial(unstructured, device, timer, found),
        "cub": partial(radix_sort, device, timer, found),
        "torch.compile": partial(compiled, device, timer, found),
    }
    each(contests, save)


Add = Callable[[dict[str, Any]], None]


def _add(rows: list[dict[str, Any]], save: Save, row: dict[str, Any]) -> None:
    rows.append(row)
    save({"rows": rows})


def contest(
    timer: Timer,
    case: str,
    ours: tuple[str, Call],
    baseline: tuple[str, Call],
    check: Check,
    pairs: int | None = None,
) -> dict[str, Any]:
    """Checks both against each other, then times them in pairs."""
    found = timer.compare(ours[1], baseline[1], check, pairs)
    return {
        "case": case,
        "ours": ours[0],
        "baseline": baseline[0],
        "ours_s": Stats.of(found.ours).median,
        "baseline_s": Stats.of(found.baseline).median,
        "times_faster": found.ratio.median,
    }


class Layer:
    """One large weight, norms given, and what is needed to compare its masks."""

    def __init__(self, device: Device) -> None:
        self.w = device.normal(device.sizes.baselines, 1, torch.float32)
        rows, cols = device.sizes.baselines
        self.norms = device.uniform(cols, 2), device.uniform(rows, 3)
        self.narrow = self.norms[0].float(), self.norms[1].float()
        self.keep = cases.keep_of(cases.DEFAULT_SPARSITY, self.w.numel())
        self.scores = lap_ext.score_from_norms(self.w, *self.norms)
        self.mask: Call = partial(
            lap_ext.mask_from_norms, self.w, *self.norms, keep=self.keep, check_finite=False
        )
        self.threshold = checks.is_top([self.mask()], [self.scores], self.keep)
        self.case = f"{rows}x{cols}, {cases.DEFAULT_SPARSITY} removed"

    def check(self, exact: bool) -> Check:
        """Makes the check of a baseline; exact: it claims to keep exactly as many."""
        return checks.same_choice([self.scores], self.threshold, 0 if exact else None)


def eager(device: Device, timer: Timer, add: Add) -> None:
    """Compares with the formula as one writes it, then a selection."""
    layer = Layer(device)

    def path(select: baselines.Select) -> Tensor:
        return select(baselines.eager_score_from_norms(layer.w, *layer.narrow), layer.keep)

    for name in ("topk", "kthvalue", "sort"):
        baseline = f"eager score + {name}", partial(path, baselines.SELECTIONS[name])
        add(
            contest(
                timer,
                layer.case,
                ("mask", layer.mask),
                baseline,
                layer.check(name != "kthvalue"),
                SLOW_PAIRS,
            )
        )


def compiled(device: Device, timer: Timer, add: Add) -> None:
    """Compares with torch.compile of the eager formula with topk."""
    layer = Layer(device)

    def whole(w: Tensor, into: Tensor, out: Tensor) -> Tensor:
        return baselines.topk(baselines.eager_score_from_norms(w, into, out), layer.keep)

    call = partial(torch.compile(whole, dynamic=False), layer.w, *layer.narrow)
    try:
        with torch.no_grad():
            call()
    except Exception as error:  # whatever the compiler's back end raises
        raise NotRunError(f"{type(error).__name__}: {str(error)[:300]}") from error
    baseline = "torch.compile of score + topk", call
    add(contest(timer, layer.case, ("mask", layer.mask), baseline, layer.check(True), SLOW_PAIRS))


def unstructured(device: Device, timer: Timer, add: Add) -> None:
    """Compares with torch.nn.utils.prune over a list of tensors."""
    count = 20 if device.cuda else 3
    per_tensor = device.sizes.baselines[0] * device.sizes.baselines[1] // count
    scores = [device.normal((per_tensor + t,), t, torch.float32).abs_() for t in range(count)]
    n = sum(x.numel() for x in scores)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, n)
    ours = partial(lap_ext.topk_mask, scores, keep=keep, check_finite=False)
    threshold = checks.is_top(lap_ext.topk_mask(scores, keep=keep), scores, keep)
    baseline = partial(baselines.global_unstructured, scores, keep)
    add(
        contest(
            timer,
            f"{count} tensors, {n / 1e6:.0f} M",
            ("topk_mask", ours),
            ("prune.global_unstructured", baseline),
            checks.same_choice(scores, threshold, 0),
            SLOW_PAIRS,
        )
    )


def radix_sort(device: Device, timer: Timer, add: Add) -> None:
    """Compares with cub::DeviceRadixSort of (score, index), whose first `keep` make the mask."""
    layer = Layer(device)
    sort = cub.RadixSort(device)
    baseline = "cub::DeviceRadixSort, scores given", partial(sort.mask, layer.scores, layer.keep)
    ours = partial(lap_ext.topk_mask, layer.scores, keep=layer.keep, check_finite=False)
    add(contest(timer, layer.case, ("topk_mask", ours), baseline, checks.equal))


# --- PyTorch's issues -----------------------------------------------------------------------------


def issue_75599(device: Device, timer: Timer, add: Add) -> None:
    """Finds the second smallest of 100 M uniform numbers."""
    n = device.sizes.issue_75599
    x = device.uniform(n, 1).float()

    def by_sort() -> Tensor:
        return x.sort().values[1]

    def by_kthvalue() -> Tensor:
        return x.kthvalue(2).values

    ours = "kth_largest(n - 1)", partial(lap_ext.kth_largest, x, n - 1, check_finite=False)
    for name, call in (("sort", by_sort), ("kthvalue", by_kthvalue)):
        case = f"pytorch #75599: 2nd smallest of {n / 1e6:g} M"
        add(contest(timer, case, ours, (name, call), checks.equal, SLOW_PAIRS))


def issue_77049(device: Device, add: Add) -> None:
    """Measures peak memory of sorting 1.5 GiB, and of selecting a tenth of it."""
    x = device.normal((device.sizes.issue_77049,), 1, torch.float32)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, x.numel())
    calls: dict[str, Call] = {
        "sort": x.sort,
        "topk_mask": partial(lap_ext.topk_mask, x, keep=keep, check_finite=False),
        "kth_largest": partial(lap_ext.kth_largest, x, keep, check_finite=False),
    }
    size = x.numel() * x.element_size()
    for name, call in calls.items():
        peak = device.peak(call)
        add({"case": "pytorch #77049", "call": name, "tensor_bytes": size, "peak_bytes": peak})
        device.free()
