# SPDX-License-Identifier: MIT
"""The same bits on every run, for every number of threads, SIMD level and memory layout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cases
import pytest
import torch
from test_native import run, wants_native
from torch import Tensor

import lap_ext

THREADS = [1, 2, 3, 7]


def digest(tensors: list[Tensor]) -> str:
    """A hash of all bits, in C-order of the indices."""
    h = hashlib.sha256()
    for x in tensors:
        h.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def everything(w_prev: Tensor, w: Tensor, w_next: Tensor) -> list[Tensor]:
    """All results of a layer, with the weights after pruning."""
    in_norm, out_norm = lap_ext.factors(w_prev, w, w_next)
    scores = lap_ext.score(w_prev, w, w_next)
    masks = [lap_ext.mask(w_prev, w, w_next, s) for s in (0.5, 0.9, 0.99)]
    lists = lap_ext.topk_mask([w_prev, scores, w_next], sparsity=0.8)
    pruned = w.clone()
    kept = lap_ext.prune_(w_prev, pruned, w_next, 0.7)
    return [in_norm, out_norm, scores, *masks, *lists, kept, pruned, lap_ext.kth_largest(w, 99)]


def layer(kind: str, outs: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution weights, large enough for the sampled plan and for several threads."""
    w = cases.hostile(kind, outs * 300 * 9, torch.float32).view(outs, 300, 3, 3)
    return torch.randn(300, 70, 3, 3), w, torch.randn(130, outs, 3, 3)


@pytest.mark.parametrize("kind", ["random", "crowd", "zeros_60", "leading_bits"])
def test_threads_runs_and_layouts(kind: str) -> None:
    args = layer(kind)
    torch.set_num_threads(1)
    expected = digest(everything(*args))
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert digest(everything(*args)) == expected, threads
        for name in ("channels_last", "reversed_strides", "sliced"):
            laid = [cases.LAYOUTS[name](x) for x in args]
            assert digest(everything(*laid)) == expected, (threads, name)


CODE = """
import sys; sys.path.insert(0, {tests!r})
import torch, lap_ext
from test_determinism import digest, everything, layer
torch.manual_seed(0)
print(digest(everything(*layer("leading_bits", 100))))
print(lap_ext.info().isa)
"""


@wants_native
def test_simd_levels() -> None:
    """Each level that this CPU supports, and the fallback."""
    code = CODE.format(tests=str(Path(__file__).parent))
    results = {}
    for level in ("baseline", "v3", "v4"):
        result = run(code, LAP_EXT_ISA=level)
        if result.returncode != 0:
            assert level != "baseline" and "supported by this CPU" in result.stderr, result.stderr
            continue
        *results[level], used = result.stdout.split()
        assert used == level
    fallback = run(code, LAP_EXT_NATIVE="0")
    *results["fallback"], used = fallback.stdout.split()
    assert used == "None" and len(set(map(tuple, results.values()))) == 1, results


def test_the_digest_sees_one_bit() -> None:
    x = torch.zeros(5)
    assert digest([x]) != digest([x.clone().index_fill_(0, torch.tensor([3]), -0.0)])
    assert digest([x.bool()]) != digest([x.bool().logical_not()])
