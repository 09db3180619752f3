# SPDX-License-Identifier: MIT
"""What the tests of benchmarks.gpu share: devices, what a step saves, the arguments of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import (
    __main__,
    device,
)

CPU = device.Device(torch.device("cpu"), rehearse=True)
GPU = device.Device(torch.device("cuda"), rehearse=False)


class Saved(dict[str, Any]):
    """What a step has saved, as steps.saver would write it."""

    def __call__(self, more: dict[str, Any]) -> None:
        self.update(json.loads(json.dumps(more)))  # it must be JSON


def arguments(tmp_path: Path, *more: str) -> argparse.Namespace:
    return __main__.parsed(["--device", "cpu", "--rehearse", "--out", str(tmp_path), *more])
