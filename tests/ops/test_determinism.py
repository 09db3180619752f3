# SPDX-License-Identifier: MIT
"""The same bits on every run, for every number of threads, SIMD level and memory layout."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import layer_cases as cases
from tests.helpers.digest import digest, everything, layer
from tests.helpers.parameters import needs_native
from tests.helpers.processes import run_python

THREADS = [1, 2, 3, 7]


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
import torch, lap_ext
from tests.helpers.digest import digest, everything, layer
from tests.helpers.structured_cases import results
torch.manual_seed(0)
print(digest(everything(*layer("leading_bits", 100))))
torch.set_num_threads(1)
print(digest(results()))
print(lap_ext.info().isa)
"""


@needs_native
def test_simd_levels() -> None:
    """Each level that this CPU supports, and the fallback."""
    results = {}
    for level in ("baseline", "v3", "v4"):
        result = run_python(CODE, LAP_EXT_ISA=level)
        if result.returncode != 0:
            assert level != "baseline" and "supported by this CPU" in result.stderr, result.stderr
            continue
        *results[level], used = result.stdout.split()
        assert used == level
    fallback = run_python(CODE, LAP_EXT_NATIVE="0")
    *results["fallback"], used = fallback.stdout.split()
    assert used == "None" and len(set(map(tuple, results.values()))) == 1, results


def test_the_digest_sees_one_bit() -> None:
    x = torch.zeros(5)
    assert digest([x]) != digest([x.clone().index_fill_(0, torch.tensor([3]), -0.0)])
    assert digest([x.bool()]) != digest([x.bool().logical_not()])
