# SPDX-License-Identifier: MIT
"""Step "huge": more than 2^31 elements, against the CPU's bits."""

from __future__ import annotations

from functools import partial

import torch

import lap_ext
from benchmarks import cases, checks
from benchmarks.gpu.bits import equal_bits
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import Save, each


def run(device: Device, limit_s: float, save: Save) -> None:
    """Checks one long tensor of scores, then one weight of as many elements."""
    del limit_s  # the parent keeps it
    device.require_kernels()
    n = device.sizes.huge
    save({"elements": n})
    each({"scores": partial(scores, device, n), "weights": partial(weights, device, n)}, save)


def scores(device: Device, n: int) -> str:
    """Checks topk_mask and kth_largest; the threshold's ties lie on both sides of element 2^31."""
    x = device.normal((n,), 1, torch.bfloat16)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, n)
    mask, value = lap_ext.topk_mask(x, keep=keep), lap_ext.kth_largest(x, keep)
    there = x.cpu()
    equal_bits(mask.cpu(), lap_ext.topk_mask(there, keep=keep), "topk_mask")
    equal_bits(value.cpu(), lap_ext.kth_largest(there, keep), "kth_largest")
    device.free()
    return f"{int(mask.count_nonzero())} kept"


def weights(device: Device, n: int) -> str:
    """Checks score, mask and prune_ of rows that are not a multiple of vectors."""
    rows = 3
    shape = (rows, n // rows)
    w = device.normal(shape, 2, torch.bfloat16)
    norms = None, device.uniform(rows, 3)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, w.numel())
    mask = lap_ext.mask_from_norms(w, *norms, keep=keep)
    there, theirs = w.cpu(), (None, norms[1].cpu())
    equal_bits(mask.cpu(), lap_ext.mask_from_norms(there, *theirs, keep=keep), "mask")
    kept = lap_ext.prune_from_norms_(w, *norms, keep=keep)
    checks.equal(kept, mask)
    checks.require(int(w.count_nonzero()) <= keep, "prune_ left weights that the mask drops")
    device.free()
    last = slice(shape[1] - 1000, None)
    got = lap_ext.score_from_norms(w[:, last], None, norms[1])
    expected = lap_ext.score_from_norms(w[:, last].cpu(), None, theirs[1])
    equal_bits(got.cpu(), expected, "score")
    return f"{list(shape)}"
