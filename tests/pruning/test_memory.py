# SPDX-License-Identifier: MIT
"""What pruning holds beside the model, by option: never more than the weights' own bytes."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.processes import run_python

OPTIONS = [
    {"scope": "global", "normalize": "norm"},
    {"scope": "global", "normalize": "lamp", "rounds": 2},
    {"rounds": 2, "batch_norm": "fold"},
]

CODE = """
import ctypes, gc
from pathlib import Path
import torch
import lap_ext
from torch import nn
from tests.helpers.memory_growth import status

torch.set_num_threads(1)
def net(n):
    return nn.Sequential(nn.Linear(n, 3 * n), nn.BatchNorm1d(3 * n), nn.ReLU(), nn.Linear(3 * n, n))
big, small = net(1024).eval(), net(32).eval()
traced, size = lap_ext.trace(big, torch.zeros(1, 1024)), sum(x.nbytes for x in big.parameters())
grown = []
for options in {options}:
    lap_ext.prune(small, torch.zeros(1, 32), 0.8, apply=False, **options)  # imports
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        break
    before = status("VmRSS")
    lap_ext.prune(big, None, 0.8, topology=traced, apply=False, **options)
    grown.append((status("VmHWM") - before) / size)
print(grown)
"""


def test_no_option_takes_more_than_the_weights() -> None:
    """6 M weights, as the kernel counts it; a mask takes a quarter of their bytes."""
    # freed blocks go back at once: glibc else keeps more of them from call to call
    run = run_python(CODE.replace("{options}", repr(OPTIONS)), MALLOC_MMAP_THRESHOLD_="65536")
    assert run.returncode == 0, run.stderr
    grown = ast.literal_eval(run.stdout)
    if not grown:
        pytest.skip("this system does not reset a process' peak (/proc/self/clear_refs)")
    assert [x for x in zip(OPTIONS, grown, strict=True) if x[1] > 1] == []
