# SPDX-License-Identifier: MIT
"""Units across layers in files: runs that are interrupted, tied vectors, zeros, data, histograms.

What is compared is the result in memory, and the directory of a run that nothing stops.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.allocation import params
from lap_ext.checkpoint import Progress
from lap_ext.checkpoint.files import MASKS
from lap_ext.errors import LapWarning
from tests.helpers.checkpoints import least_memory, write
from tests.helpers.interrupted import SHARDS, WORK, contents, facts, stopping

INPUTS = torch.zeros(2, 6)
CHANNELS: dict[str, Any] = {"structure": "channel"}
WAYS: dict[str, dict[str, Any]] = {
    "layer": {},
    "rounds": {"rounds": 3, "scope": "global"},
    "target": {"sparsity": params(0.5), "rounds": 2, "uniform": True},
    "cost": {"cost": "flops", "aggregate": "mean", "rounds": 2},
}


def network() -> nn.Sequential:
    """Channels in two families, with batch norms; the widths are no multiples of 8."""
    torch.manual_seed(3)
    first, second = nn.BatchNorm1d(30), nn.BatchNorm1d(21)
    for norm in (first, second):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.1, 1.0)
    layers = nn.Linear(6, 30), first, nn.ReLU(), nn.Linear(30, 21), second, nn.Linear(21, 9)
    return nn.Sequential(*layers).eval()


def prune(source: Path, out: Path, sparsity: Any = 0.6, **options: Any) -> Any:
    given = {"model": network(), "example_inputs": INPUTS} | CHANNELS | options
    return checkpoint.prune(source, out, sparsity, **given)


def in_memory(model: nn.Module, sparsity: Any = 0.6, **options: Any) -> lap_ext.PruneResult:
    return lap_ext.prune(model, INPUTS, sparsity, **CHANNELS | options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "dense", network().state_dict(), SHARDS)


def interrupt(source: Path, step: str, count: int, **options: Any) -> Path:
    """Stops a pruning into out, beside source; gives its working directory."""
    stop = stopping(step, count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune(source, source.parent / "out", on_progress=stop, **options)
    return source.parent / WORK


@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_is_stopped_anywhere_goes_on(name: str, source: Path, tmp_path: Path) -> None:
    """At the first, the middle and the last report of each kind, with the smallest budget."""
    options = WAYS[name]
    few = least_memory(lambda few: prune(source, tmp_path / "no", memory=few, **options))
    options = options | {"memory": few}
    seen: list[Progress] = []
    got = prune(source, tmp_path / "full", on_progress=seen.append, **options)
    twin = network()
    want = in_memory(twin, **WAYS[name])
    assert got.masks == want.masks and list(got.layers) == list(want.layers)
    assert list(got.families) == list(want.families) and list(got.fixed) == list(want.fixed)
    full = contents(tmp_path / "full")
    stored: dict[str, Tensor] = {}
    for path in (tmp_path / "full").glob("model*.safetensors"):
        stored |= load_file(path)
    assert all(torch.equal(stored[x], y) for x, y in twin.state_dict().items())
    steps = [x.step for x in seen]
    for step in ("measure", "rank", "write"):
        times = steps.count(step)
        for count in sorted({1, (times + 1) // 2, times}):
            interrupt(source, step, count, **options)
            prune(source, tmp_path / "out", **options)
            assert contents(tmp_path / "out") == full, (step, count)
            shutil.rmtree(tmp_path / "out")


def test_what_has_been_chosen_is_not_chosen_again(source: Path, tmp_path: Path) -> None:
    """A resumed run only writes; shards that are there are checked, with the masks of vectors."""
    options = WAYS["rounds"]
    work = interrupt(source, "write", 8, **options)
    assert {"round 3 units", "zero layers"} == set(facts(work)["notes"])
    assert facts(work)["round"][0] == 2 and facts(work)["done"]
    seen: list[Progress] = []
    prune(source, tmp_path / "out", on_progress=seen.append, **options)
    assert {x.step for x in seen} == {"check", "write"}
    shutil.rmtree(tmp_path / "out")
    work = interrupt(source, "write", 8, **options | {"sparsity": 0.5})
    masks = work / "files" / MASKS
    data = bytearray(masks.read_bytes())
    first = next(iter(facts(work)["done"]))
    assert first.startswith("model-00001")
    begin = 8 + int.from_bytes(data[:8], "little")  # of the masks: 0, 3, 5, then of vectors
    data[begin + sum(-(-n // 8) for n in (30 * 6, 21 * 30, 9 * 21))] ^= 1
    masks.write_bytes(data)
    with pytest.warns(LapWarning, match="These are done again: the masks"):
        prune(source, tmp_path / "out", **options | {"sparsity": 0.5})
    want = in_memory(network(), **options | {"sparsity": 0.5})
    assert lap_ext.Masks.load(tmp_path / "out" / MASKS) == want.masks


@pytest.mark.parametrize(
    "change",
    [{"structure": "unit"}, {"cost": "weights"}, {"uniform": True}, {"sparsity": params(0.5)},
     {"min_keep": 3}, {"sparsity": {"0": 0.6}}, {"layers": ["0"]}],
    ids=str,
)  # fmt: skip
def test_another_task_starts_anew(change: dict[str, Any], source: Path, tmp_path: Path) -> None:
    interrupt(source, "write", 6)
    with pytest.warns(LapWarning, match="is of other options"):
        prune(source, tmp_path / "out", **change)
    want = in_memory(network(), **change)
    assert lap_ext.Masks.load(tmp_path / "out" / MASKS) == want.masks


class Tied(nn.Module):
    """One bias that two layers share, and a norm that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two, self.head = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 3)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.one(x) + self.two(x)))  # type: ignore[no-any-return]


def test_every_copy_of_a_tied_bias_is_masked(tmp_path: Path) -> None:
    model = Tied()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    source = write(tmp_path / "dense", state, 2)
    result = prune(source, tmp_path / "out", 0.5, model=Tied())
    want = in_memory(model, 0.5)
    assert result.masks == want.masks and set(result.masks) == {"one", "two", "head", "one.bias"}
    stored: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("model*.safetensors"):
        stored |= load_file(path)
    for name in ("one.bias", "two.bias"):
        assert torch.equal(stored[name] != 0, want.masks["one.bias"])
    state["two.bias"] += 1
    other = write(tmp_path / "other", state, 2)
    with pytest.raises(ValueError, match=r"'one.bias' and 'two.bias' alike"):
        prune(other, tmp_path / "no", 0.5, model=Tied())


def test_zeros_are_pruned_but_in_layers_that_have_nothing_else(tmp_path: Path) -> None:
    """A dead channel counts as removed; a layer of zeros stays as it is, and so does its mask."""
    model = network()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[3].weight[:, 3] = 0
        model[3].weight[5, 7] = 0
        model[5].weight.zero_()
    source = write(tmp_path / "dense", model.state_dict(), 2)
    for rounds in (1, 2):
        how: dict[str, Any] = {"rounds": rounds, "criterion": "magnitude"}
        got = prune(source, tmp_path / f"{rounds}", 0.5, **how)
        want = in_memory(model, 0.5, apply=False, **how)
        assert got.masks == want.masks and list(got.layers) == list(want.layers)
        assert not want.masks["0"][3].any() and not want.masks["3"][5, 7]
        row = want.layers[-1]
        assert row.kept == 9 * want.families[1].kept and row.nonzero == 0
        assert not want.empty_layers


@pytest.mark.parametrize("options", [{"rounds": 2}, {"scope": "global"}], ids=str)
def test_scores_are_counted_for_a_report(
    options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """They are those of lap_ext.scores, each kept or pruned; the page shows families."""
    got = prune(source, tmp_path / "out", count_scores=True, **options)
    scores = lap_ext.scores(network(), INPUTS)
    for row in got.layers:
        counts = got.scores[row.name]
        assert counts.kept.total() + counts.zeros_kept == row.kept
        assert counts.lowest == float(scores[row.name][got.masks[row.name]].min())
    got.report(tmp_path / "page.html", source, INPUTS, model=network())
    page = (tmp_path / "page.html").read_text()
    assert "channels of" in page and "Fixed: 9 channels of &#x27;5&#x27;" in page
    shutil.rmtree(tmp_path / "out")
    interrupted = {"count_scores": True} | options
    interrupt(source, "write", 6, **interrupted)
    again = prune(source, tmp_path / "out", **interrupted)
    assert again.scores == got.scores


def test_without_masks_nothing_is_written_but_the_weights(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "a", save_masks=False)
    prune(source, tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert b.pop(MASKS) and a == b
    assert checkpoint.verify(tmp_path / "b", source).ok
    assert checkpoint.inspect(tmp_path / "b", model=network(), example_inputs=INPUTS)


def test_units_must_fit_into_memory(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory of [\d,]+ bytes or more \([\d,]+ bytes of sums"):
        prune(source, tmp_path / "out", memory=100)
    few = least_memory(lambda few: prune(source, tmp_path / "no", memory=few))
    with pytest.raises(ValueError, match="room for a full layer, which aggregate='exact' needs"):
        prune(source, tmp_path / "out", memory=few, aggregate="exact")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_pruned(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a model with units for structure='head', got none"):
        prune(source, tmp_path / "out", structure="head")
    with pytest.raises(ValueError, match=r"no sparsity for masks of structure 'channel'"):
        prune(source, tmp_path / "out")
        checkpoint.verify(tmp_path / "out", source, sparsity=0.6)


def test_a_bias_that_is_in_no_file(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["3.bias"]
    source = write(tmp_path / "dense", state, 2)
    assert checkpoint.prune(source, tmp_path / "out", 0.5, model=network(), example_inputs=INPUTS)
    with pytest.raises(ValueError, match=r"3\.bias"):
        prune(source, tmp_path / "no", 0.5)


@pytest.mark.parametrize("rounds", [1, 2])
def test_data(rounds: int, tmp_path: Path) -> None:
    """Minitron scores units by what they put out; statistics are read from a file."""
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(7, 6, generator=generator) for _ in range(3)]
    model = network()
    source = write(tmp_path / "dense", model.state_dict(), 2)
    statistics = lap_ext.criteria.measure(network(), INPUTS, "minitron", batches)
    save_file(statistics, tmp_path / "statistics")
    given: dict[str, Any] = {"criterion": "minitron", "structure": "unit", "rounds": rounds}
    read: dict[str, Any] = given | {"data": tmp_path / "statistics", "count_scores": True}
    got = prune(source, tmp_path / "out", 0.5, **read)
    assert got.scores == {}
    want = lap_ext.prune(model, INPUTS, 0.5, data=batches, **given)
    assert got.masks == want.masks and list(got.families) == list(want.families)
