# SPDX-License-Identifier: MIT
"""What tests are parametrized with, what they skip without, and the one table of tolerances.

Masks and bits are compared with torch.equal, never with a tolerance; the table is for comparing
a score (rounded four times) with float64 arithmetic of another kind.
"""

from __future__ import annotations

import os

import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

SCORE_DTYPE = dict.fromkeys(DTYPES, torch.float32) | {torch.float64: torch.float64}

# A score is rounded four times (both norms, their product, times |w|): (1 + 2**-24)**4 - 1, and
# 2**-53 for float64, where the norms' own sums add some more. The half types score in float32.
TOLERANCE = {
    torch.float32: 4.01 * 2.0**-24,
    torch.float16: 4.01 * 2.0**-24,
    torch.bfloat16: 4.01 * 2.0**-24,
    torch.float64: 64 * 2.0**-53,
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])

each_threads = pytest.mark.parametrize("threads", [1, 2, 3], ids=lambda n: f"threads={n}")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable CUDA device")

_PURE = os.environ.get("LAP_EXT_BUILD") == "pure" or os.environ.get("LAP_EXT_NATIVE") == "0"

needs_native = pytest.mark.skipif(
    _PURE, reason="the fallback was asked for (LAP_EXT_BUILD=pure or LAP_EXT_NATIVE=0)"
)
