# SPDX-License-Identifier: MIT
"""Kernels run here on as many threads as torch has by itself."""

from __future__ import annotations

import pytest
import torch

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _all_threads(_start: None) -> None:
    torch.set_num_threads(THREADS)
