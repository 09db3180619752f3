# SPDX-License-Identifier: MIT
"""Budgets: how they are written, what they allow, and that a process stays within them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

import lap_ext
from lap_ext.checkpoint import memory
from lap_ext.checkpoint.files import MASKS
from lap_ext.errors import LapValueError
from tests.helpers.checkpoints import INPUTS, least_memory, network, prune, write
from tests.helpers.processes import run_python

MB = 10**6


def test_parsed() -> None:
    for text, count in (
        ("4GB", 4 * 10**9), ("4gb", 4 * 10**9), ("4 G", 4 * 10**9), ("512MiB", 512 << 20),
        ("1.5kB", 1500), ("2TiB", 2 << 40), ("1000", 1000), ("7B", 7), (12, 12),
    ):  # fmt: skip
        assert memory.parsed(text) == count
    for text in ("", "GB", "4PB", "-4GB", "4GB5", "0MB"):
        with pytest.raises(LapValueError, match="expected memory") as caught:
            memory.parsed(text)
        assert caught.value.text("--{}".format).startswith("expected --memory ")


def test_what_does_not_fit_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", network().state_dict())
    few = least_memory(lambda few: prune(source, tmp_path / "out", memory=few))
    with pytest.raises(ValueError, match=r"a row of layer '3' and the norms .*, got [\d,]+\.$"):
        prune(source, tmp_path / "out", memory=few - 1)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
    prune(source, tmp_path / "out", memory=few)


CASES = [
    (200, ""), (20, ""), (20, "scope='global', normalize='norm'"), (20, "batch_norm='fold'"),
    (40, "scope='global', normalize='lamp'"), (200, "scope='global', normalize='lamp'"),
    (400, "count_scores=True"), (20, "scope='global', count_scores=True"),
]  # fmt: skip


@pytest.mark.big  # minutes: each case is a process with its own budget
@pytest.mark.parametrize("megabytes, options", CASES)
def test_a_process_stays_within_its_budget(megabytes: int, options: str, tmp_path: Path) -> None:
    """168 MB of weights in layers of 34 and 67 MB; the peak is the kernel's own count."""
    code = f"""
        from tests.helpers.memory_growth import grown, medium
        print(grown(medium(), {str(tmp_path)!r}, {megabytes * MB}, **dict({options})))
    """
    run = run_python(textwrap.dedent(code))
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() == "None":
        pytest.skip("this system does not reset a process' peak (/proc/self/clear_refs)")
    assert int(run.stdout) <= megabytes * MB


def test_masks_are_read_one_at_a_time(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", network().state_dict())
    got = prune(source, tmp_path / "out")
    want = lap_ext.prune(network(), INPUTS, 0.6).masks
    for name, mask in got.masks.items():
        assert torch.equal(mask, want[name])
    assert got.masks.counts() == want.counts()
    assert (tmp_path / "out" / MASKS).stat().st_size < 2000
