# SPDX-License-Identifier: MIT
"""lap-ext bench: what it compares and how it counts. No test depends on a time."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext.cli import bench
from tests.helpers.command_line import Run, one_line

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SAMPLE_S", 1e-5)
    monkeypatch.setattr(bench, "_PAIRS", 3)
    monkeypatch.setattr(bench, "_STANDARD", ((6, 5), (4, 3, 2, 2)))


def test_standard_shapes(run: Run) -> None:
    status, out, error = run("bench", "--json", "--sparsity", "0.5")
    shown = json.loads(out)
    assert (status, error) == (0, "")
    assert [(x["shape"], x["layers"]) for x in shown["cases"]] == [([6, 5], 1), ([4, 3, 2, 2], 1)]
    assert (shown["sparsity"], shown["device"], shown["left_out"]) == (0.5, "cpu", 0)
    assert shown["lap_ext"]["version"] == lap_ext.__version__
    for case in shown["cases"]:
        assert [x["name"] for x in case["baselines"]] == ["topk", "kthvalue", "sort"]
        for x in case["baselines"]:
            assert x["pairs"] == 3 and 0 < x["q1"] <= x["ratio"] <= x["q3"]
            assert min(x["seconds"], x["lap_ext_seconds"]) > 0


def test_table(run: Run) -> None:
    status, out, _ = run("bench")
    lines = out.splitlines()
    assert status == 0 and "sparsity 0.9 on cpu" in out and "neither is measurably faster" in out
    rows = [line for line in lines if " topk " in line]
    assert [row.split()[:3] for row in rows] == [
        ["6x5", "float32", "topk"],
        ["4x3x2x2", "float32", "topk"],
    ]


def test_a_busy_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the table, and in the JSON; the load is read before anything is measured."""
    for load, said in ((0.1, False), (3.25, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert ("The machine is busy: load average 3.2 on" in run("bench")[1]) == said
        assert json.loads(run("bench", "--json")[1])["load"] == load


def test_shapes_of_a_factory(run: Run) -> None:
    shown = json.loads(run("bench", "nets:net", "--json")[1])
    assert [(x["shape"], x["dtype"]) for x in shown["cases"]] == [
        ([16, 8], "float32"),
        ([4, 16], "float32"),
    ]


def test_shapes_of_a_directory(
    run: Run, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with the most weights together first; what is left out is reported."""
    monkeypatch.setattr(bench, "_MOST_SHAPES", 3)
    monkeypatch.setattr(bench, "_MOST_WEIGHTS", 767)
    shown = json.loads(run("bench", checkpoints / "llama", "--json")[1])
    assert [(x["shape"], x["layers"]) for x in shown["cases"]] == [
        ([24, 16], 2),
        ([16, 16], 2),
        ([16, 24], 1),
    ]
    assert shown["left_out"] == 2  # 48x16, which is too large, and 8x16
    assert "2 more shapes of the model were left out." in run("bench", checkpoints / "llama")[1]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(60, 50), (20, 30, 3, 3), (8, 1, 3)])
def test_baselines_keep_the_same(shape: tuple[int, ...], kind: torch.dtype) -> None:
    """But for a few at the threshold, where norms in float32 decide."""
    progress = bench.Progress(show=False)
    baselines = bench._measured(shape, kind, CPU, 0.7, progress)
    assert [x.differ for x in baselines] == [0, 0, 0]
    assert progress.done == 3 * torch.Size(shape).numel()


def test_wrong_results_end_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lap_ext.mask
    monkeypatch.setattr(lap_ext, "mask", lambda *x, **how: right(*x, **how).flip(0))
    assert "lap_ext.mask is not the sort of lap_ext.score" in one_line(run("bench"))
    monkeypatch.undo()
    mine, scores = torch.tensor([True, False, True]), torch.tensor([2.0, 2.0 + 1e-6, 5.0])
    assert bench._difference("x", mine, torch.tensor([False, True, True]), scores) == 2
    with pytest.raises(RuntimeError, match=r"keep different weights of \[3\]"):
        bench._difference("x", mine, torch.tensor([True, False, False]), scores)


def test_a_wrong_baseline_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = {"topk": lambda scores, keep: bench._topk(-scores, keep)}
    monkeypatch.setattr(bench, "_SELECT", lowest)
    assert "lap_ext.mask and topk keep different weights" in one_line(run("bench"))


def test_pairs_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, the order changing; the ratio is that of pairs, not of medians."""
    script = {"ours": [1.0, 2.0, 4.0], "other": [3.0, 8.0, 4.0]}  # ratios 3, 4, 1
    order: list[str] = []

    class Timer:
        def __init__(self, stmt: str, globals: dict[str, Any], num_threads: int) -> None:
            assert (stmt, num_threads) == ("call()", torch.get_num_threads())
            self.name = "other" if "select" in globals["call"].__code__.co_varnames else "ours"
            self.left = list(script[self.name])

        def blocked_autorange(self, min_run_time: float) -> Any:
            order.append(self.name)
            return type("Measurement", (), {"median": self.left.pop(0)})

    monkeypatch.setattr(bench, "Timer", Timer)
    monkeypatch.setattr(bench, "_SELECT", {"sort": bench._sort})
    (baseline,) = bench._measured((6, 5), torch.float32, CPU, 0.5, bench.Progress(show=False))
    assert (baseline.ratio, baseline.q1, baseline.q3, baseline.pairs) == (3.0, 2.0, 3.5, 3)
    assert (baseline.lap_ext_seconds, baseline.seconds) == (2.0, 4.0)
    assert order == ["other", "ours", "ours", "other", "other", "ours"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extra_memory() -> None:
    def call() -> Tensor:
        return torch.ones(1 << 24, dtype=torch.uint8) + 1  # 16 MB, twice

    extra = bench._extra_memory(call, CPU)
    if extra is None:
        pytest.skip("the peak of this process cannot be set back")
    assert 30e6 < extra < 60e6


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sparsity", "1"], "expected 0 <= --sparsity < 1, got 1."),
        (["--sparsity", "90%"], "invalid float value: '90%'"),
        (["--sparsity", "nan"], "expected 0 <= --sparsity < 1, got nan."),
        (["--device", "gpu"], "expected --device to be one that torch has, got 'gpu'"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--input", "1x8"], "expected a MODEL with --input, got none."),
    ],
)
def test_mistakes(run: Run, argv: list[str], said: str) -> None:
    assert said in one_line(run("bench", *argv))
