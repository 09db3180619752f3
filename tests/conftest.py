# SPDX-License-Identifier: MIT
"""What holds for every test: the random state, threads, devices, the examples of hypothesis."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.helpers")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile(
    "ci",
    max_examples=25,  # .ci/run has 25 minutes; HYPOTHESIS_PROFILE=explore has 2000
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
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: os.fsync looks at the file, and waits for nothing."""
    monkeypatch.setattr(os, "fsync", os.fstat)


@pytest.fixture(autouse=True)
def _start() -> Iterator[None]:
    """Every test starts from the same random state, and on one thread: tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_num_threads(threads)  # whatever the test has set


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine that has native kernels."""
    return request.param
