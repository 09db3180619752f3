# SPDX-License-Identifier: MIT
"""Code in a fresh interpreter, and two processes of one training (by gloo, on this machine)."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]
Work = Callable[[int, str], None]  # (rank, folder)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a fresh interpreter with changes to the environment."""
    # By -c, not a file: the interpreter then finds lap_ext and tests as this one does.
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def two_processes(work: Work, folder: Path) -> None:
    """Runs work, a function of a module, in both; an exception in either fails here."""
    name = f"{work.__module__}, {work.__name__!r}, {str(folder)!r}"
    run = run_python(f"import {work.__module__}, tests.helpers.processes as helper\n"
                     f"helper.fork_both({name})")  # fmt: skip
    assert run.returncode == 0, run.stderr


def fork_both(module: ModuleType, name: str, folder: str) -> None:
    """Forks two processes that call a function of module: they share what it has imported."""
    import torch._dynamo  # by tracing and torch.compile, or it is imported twice

    torch.multiprocessing.start_processes(
        _process, (getattr(module, name), folder), nprocs=2, start_method="fork"
    )


def _process(rank: int, work: Work, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # 127.0.0.1
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    work(rank, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # DistributedDataParallel still holds the group: its threads would now and then meet an
    # interpreter that is being taken down, and abort (pytorch issues 179291 and 190489).
    os._exit(0)
