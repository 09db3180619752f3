# SPDX-License-Identifier: MIT
"""Seeds, devices, dtypes and the one tolerance table.

Masks and bits are compared with torch.equal, never with a tolerance; the table is for comparing
a score (rounded four times) with float64 arithmetic of another kind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# A score is rounded four times (both norms, their product, times |w|): (1 + 2**-24)**4 - 1, and
# 2**-53 for float64, where the norms' own sums add some more. The half types score in float32.
TOLERANCE = {
    torch.float32: 4.01 * 2.0**-24,
    torch.float16: 4.01 * 2.0**-24,
    torch.bfloat16: 4.01 * 2.0**-24,
    torch.float64: 64 * 2.0**-53,
}
SCORE_DTYPE = dict.fromkeys(DTYPES, torch.float32) | {torch.float64: torch.float64}

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
each_threads = pytest.mark.parametrize("threads", [1, 2, 3], ids=lambda n: f"threads={n}")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable CUDA device")

# The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile(
    "ci",
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", parent=settings.get_profile("ci"), max_examples=2000)
settings.register_profile("explore", settings.get_profile("explore"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """--run-big adds the tests that need minutes and some 20 GB of memory."""
    parser.addoption("--run-big", action="store_true", help="run tests marked big")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks."""
    config.addinivalue_line(
        "markers", "big: more than 2**31 elements, or minutes; only with --run-big"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the big tests unless they are asked for."""
    if config.getoption("--run-big"):
        return
    big = [item for item in items if item.get_closest_marker("big")]
    items[:] = [item for item in items if not item.get_closest_marker("big")]
    config.hook.pytest_deselected(items=big)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and number of threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_num_threads(threads)  # for the next test, whatever this one has set


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine that has native kernels."""
    return request.param
