# SPDX-License-Identifier: MIT
"""The paper's experiment: densities, fair comparisons, runs that go on where they stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext

for needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(needed, reason="the benchmarks need the extras bench and demo")

from benchmarks.paper import __main__ as command  # noqa: E402
from benchmarks.paper import data, experiment, nets, report, settings  # noqa: E402
from benchmarks.paper.methods import METHODS, available, masks_of  # noqa: E402
from benchmarks.paper.settings import SETTINGS, weights_of  # noqa: E402
from benchmarks.paper.store import Cell, Key, Store  # noqa: E402

# of the paper's code: prunable weights; level -> per cent kept
DENSITIES: dict[str, tuple[int, dict[int, float]]] = {
    "mlp": (1_147_000, {4: 6.36, 5: 3.21, 6: 1.63, 7: 0.84, 8: 0.43, 9: 0.23, 10: 0.12}),
    "lenet": (61_770, {5: 17.92, 10: 3.42, 15: 0.73}),
    "conv6": (
        2_261_184,
        {12: 10.62, 13: 8.86, 14: 7.39, 15: 6.18, 16: 5.17, 17: 4.32, 18: 3.62},
    ),
    "vgg19": (
        20_024_000,
        {13: 12.09, 15: 8.74, 17: 6.31, 19: 4.56, 21: 3.30, 23: 2.38, 25: 1.72, 27: 1.24},
    ),
    "resnet18": (10_992_320, {14: 10.30, 17: 6.33, 20: 3.89, 23: 2.40, 26: 1.48, 29: 0.92}),
    "vgg19_64": (
        20_121_280,
        {13: 12.16, 14: 10.34, 15: 8.80, 16: 7.48, 17: 6.36, 18: 5.41, 19: 4.61, 20: 3.92},
    ),
    "resnet50_64": (
        21_087_936,
        {17: 6.52, 19: 4.74, 21: 3.45, 23: 2.51, 25: 1.83, 27: 1.34, 29: 0.98},
    ),
    "wrn-16-8_64": (
        10_885_552,
        {13: 12.22, 15: 8.85, 17: 6.41, 19: 4.65, 21: 3.37, 23: 2.45, 25: 1.78, 27: 1.29, 29: 0.94},
    ),
}
IMAGES = {
    "digits": (1, 8, 10),
    "mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "tiny-imagenet": (3, 64, 200),
}
TINY = ["--seeds", "1", "--train-steps", "4", "--steps", "2", "--batches", "2"]

FEW = {  # the nets of the experiment, smaller
    "digits-mlp": replace(SETTINGS["digits-mlp"], build=partial(nets.mlp, (64, *(20,) * 4, 10))),
    "digits-resnet": replace(
        SETTINGS["digits-resnet"],
        build=partial(nets.resnet, (1, 1), channels=1, widths=(4, 8)),
        ratios=(0.0, 0.15, 0.15, 0.15, 0.15, 0.10),
    ),
}

Run = Callable[..., int]


@cache
def traced(name: str) -> tuple[nn.Module, lap_ext.Topology, dict[str, Tensor]]:
    """One of the smaller nets, its topology and its weights, to be loaded again."""
    torch.manual_seed(0)
    net = FEW[name].net().eval()
    topology = lap_ext.trace(net, torch.zeros(2, 1, 8, 8))
    return net, topology, {key: value.clone() for key, value in net.state_dict().items()}


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command on the smaller nets, with results in tmp_path/found.json."""
    monkeypatch.setattr(settings, "SETTINGS", {**SETTINGS, **FEW})
    for module in (command, experiment):
        monkeypatch.setattr(module, "SETTINGS", settings.SETTINGS)
    monkeypatch.setattr(command, "CHECKPOINTS", tmp_path / "dense")

    def call(*arguments: str) -> int:
        return command.main([*TINY, "--out", str(tmp_path / "found.json"), *arguments])

    return call


@pytest.fixture
def cells(tmp_path: Path) -> Callable[[], dict[Key, Cell]]:
    return lambda: Store(tmp_path / "found.json").cells


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return SETTINGS[name].build()


@pytest.mark.parametrize("name", DENSITIES)
def test_weights_and_densities_are_the_papers(name: str) -> None:
    net, setting = meta(name), SETTINGS[name]
    weights, densities = DENSITIES[name]
    assert sum(math.prod(weight.shape) for weight in weights_of(net).values()) == weights
    assert {t: round(setting.kept_per_cent(net, t), 2) for t in setting.levels} == densities


@pytest.mark.parametrize("name", SETTINGS)
def test_nets_fit_their_data(name: str) -> None:
    channels, side, classes = IMAGES[SETTINGS[name].datasets[0]]
    images = torch.empty(2, channels, side, side, device="meta")
    assert meta(name)(images).shape == (2, classes)


def test_what_is_left_alone() -> None:
    net, setting = meta("digits-resnet"), SETTINGS["digits-resnet"]
    stem, *projections = setting.spared(net)
    assert stem == "0"
    assert len(projections) == 2
    assert all("shortcut" in name for name in projections)
    assert len(setting.pruned(net)) == 7
    kept, n = setting.kept(net, 12)
    assert kept / n == pytest.approx(0.85**12, rel=0.02)  # and a few more of the last layer


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_as_many(name: str, cpu: torch.device) -> None:
    method = METHODS[name]
    if name not in available():
        pytest.skip(f"{method.name} needs BackPACK")
    setting = FEW["digits-mlp" if method.only_chains else "digits-resnet"]
    assert method.suits(setting)
    net, topology, state = traced("digits-mlp" if method.only_chains else "digits-resnet")
    net.load_state_dict(state)
    level, digits = setting.levels[0], data.load("digits", None, cpu)
    masks = masks_of(topology, setting, method, level, digits, 2, seed=0)
    assert sorted(masks) == sorted(setting.pruned(net))
    assert sum(int(mask.sum()) for mask in masks.values()) == setting.kept(net, level)[0]
    for layer, mask in masks.items():
        assert torch.equal(weights_of(net)[layer] != 0, mask)


def test_which_methods_suit_a_net() -> None:
    def left_out(name: str) -> set[str]:
        return {method for method in METHODS if not METHODS[method].suits(SETTINGS[name])}

    assert left_out("digits-mlp") == left_out("conv6") == {"mp-bn"}
    assert left_out("digits-resnet") == left_out("wrn-16-8_64") == {"obd", "obd-lap"}
    assert left_out("vgg19") == set()


def test_a_run_and_its_report(
    run: Run, cells: Callable[[], dict[Key, Cell]], capsys: Any, tmp_path: Path
) -> None:
    arguments = ("--methods", "mp,lap,mp-bn", "--levels", "4,5")
    assert run(*arguments) == 0
    found = cells()
    # one dense cell each; mp-bn is mp without batch norms
    assert len(found) == 1 + 2 * 2 + 1 + 2 * 3
    assert all(0 <= cell.tuned <= 100 and cell.key.tune_steps in (0, 2) for cell in found.values())
    out = capsys.readouterr().out
    assert "digits-mlp: test accuracy in %, one seed, dense" in out
    assert "digits-resnet: LAP against MP, seed by seed" in out
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "found.json").read_text())["facts"]
    assert {"commit", "cpu", "torch", "lap_ext"} <= facts.keys()
    assert run(*arguments, "--report", "--markdown") == 0
    assert "| kept % | 8.13 | 4.70 |" in capsys.readouterr().out


def test_finished_cells_are_skipped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--nets", "digits-resnet", "--methods", "mp", "--levels", "4")
    assert run(*arguments) == 0

    def fails(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "train", fails)
    assert run(*arguments) == 0
    with pytest.raises(AssertionError, match="trained again"):
        run(*arguments[:-1], "4,5")  # a new level; the dense net is not trained again
    with pytest.raises(AssertionError, match="trained again"):
        run(*arguments, "--fresh")


def test_what_makes_another_cell() -> None:
    plan = experiment.Plan(("digits-mlp",), (0,), ("mp", "wanda"), levels=(4,))
    dense, mp, wanda = plan.keys()
    assert replace(plan, batches=3).keys() == [dense, mp, replace(wanda, batches=3)]
    tuned = [replace(key, tune_steps=7) for key in (mp, wanda)]
    assert replace(plan, tune_steps=7).keys() == [dense, *tuned]
    assert not set(replace(plan, train_steps=7).keys()) & {dense, mp, wanda}


def test_a_stopped_run_goes_on(
    run: Run,
    cells: Callable[[], dict[Key, Cell]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tmp_path: Path,
) -> None:
    arguments = ("--nets", "digits-resnet", "--methods", "mp,rp,lap", "--levels", "4,9")
    assert run(*arguments) == 0
    whole = {key: (cell.kept, cell.pruned, cell.tuned) for key, cell in cells().items()}
    (tmp_path / "found.json").unlink()
    (tmp_path / "dense" / "digits-resnet-digits-seed0-4.pt").unlink()
    calls, original = [0], experiment.train

    def stopped(*given: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:  # the dense net, two cells, and then
            raise KeyboardInterrupt
        original(*given)

    monkeypatch.setattr(experiment, "train", stopped)
    assert run(*arguments) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert len(cells()) == 1 + 2
    assert run(*arguments) == 0
    assert calls[0] == 1 + 6 + 1  # no cell twice but the stopped one
    assert {key: (cell.kept, cell.pruned, cell.tuned) for key, cell in cells().items()} == whole
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_all_methods_have_the_same_start_and_batches(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    batches: list[list[Tensor]] = []
    prune, train = experiment.masks_of, experiment.train

    def seen_prune(topology: lap_ext.Topology, *given: Any) -> Any:
        state = topology.model.state_dict()
        starts.append(sum(p.double().abs().sum().item() for p in state.values()))
        return prune(topology, *given)

    def seen_train(net: nn.Module, digits: data.Data, *given: Any) -> None:
        drawn: list[Tensor] = []
        batches.append(drawn)
        one = replace(digits, augment=lambda x: drawn.append(x.clone()) or x)  # type: ignore[func-returns-value]
        train(net, one, *given)

    monkeypatch.setattr(experiment, "masks_of", seen_prune)
    monkeypatch.setattr(experiment, "train", seen_train)
    assert run("--nets", "digits-resnet", "--methods", "mp,rp,wanda", "--levels", "4,9") == 0
    assert len(starts) == 6
    assert len(set(starts)) == 1
    dense, *tuned = batches
    assert len(dense) == 4
    for other in tuned:
        assert [torch.equal(a, b) for a, b in zip(other, tuned[0], strict=True)] == [True, True]
    assert not torch.equal(dense[0], tuned[0][0])
    assert len(dense[0].unique(dim=0)) > 50  # 60 different images, but for doubles in the data


def test_iterative_carries_masks_over(
    run: Run, cells: Callable[[], dict[Key, Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    original = experiment.masks_of

    def watched(*given: Any) -> Any:
        seen.append(dict(original(*given)))
        return seen[-1]

    monkeypatch.setattr(experiment, "masks_of", watched)
    arguments = ("--nets", "digits-resnet", "--methods", "lap", "--levels", "2,4")
    assert run(*arguments, "--schedule", "iterative") == 0
    assert len(seen) == 4
    for before, after in pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in before)
    assert sorted(key.level for key in cells()) == [0, 2, 4]
    assert run(*arguments) == 0  # other cells than those of the one-shot schedule
    assert len(cells()) == 5


def test_training_keeps_the_masks(cpu: torch.device) -> None:
    net, topology, state = traced("digits-resnet")
    net.load_state_dict(state)
    digits = data.load("digits", None, cpu)
    masks = masks_of(topology, FEW["digits-resnet"], METHODS["mp"], 12, digits, 1, seed=0)
    before = {name: weight.clone() for name, weight in weights_of(net).items()}
    experiment.train(net, digits, 3, 1e-3, 60, 0, masks)
    for name, mask in masks.items():
        weight = weights_of(net)[name]
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != before[name][mask]).any()


def test_a_foreign_file_is_not_overwritten(run: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "found.json").write_text('{"other": 1}')
    assert run() == 1
    assert "Move it away, or start anew with --fresh." in capsys.readouterr().err
    assert (tmp_path / "found.json").read_text() == '{"other": 1}'


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--methods", "mp,lapp"), "expected some of mp, mp-bn, rp"),
        (("--nets", "resnet"), "got resnet"),
        (("--levels", "0"), "expected a whole number >= 1, got '0'"),
        (("--seeds", "x"), "expected a whole number >= 1, got 'x'"),
    ],
)
def test_arguments(run: Run, arguments: tuple[str, ...], text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert text in capsys.readouterr().err


def test_gains_by_hand() -> None:
    """Seed by seed: the seeds' own differences drop out."""
    part = report.Part(
        net="mlp",
        dense={0: 98.0, 1: 98.0, 2: 98.0},
        kept={7: 0.84},
        tuned={"mp": {7: {0: 50.0, 1: 70.0, 2: 90.0}}, "lap": {7: {0: 53.0, 1: 74.0, 2: 95.0}}},
        pruned={},
    )
    gain = part.gain("lap", 7)
    assert gain is not None
    # 3, 4, 5: deviation 1, half interval 4.30 * 1 / sqrt(3) = 2.48 < 4
    assert (gain.values, str(gain), gain.verdict) == ((3.0, 4.0, 5.0), "+4.0 ± 1.0", "ahead")
    assert report.Gain((-1.0, 2.0, 3.0)).verdict == ""
    assert report.Gain((-3.0, -4.0, -5.0)).verdict == "behind"
    assert report.Gain((3.0, 3.0)).verdict == "?"
    _, rows = report.against(part, "lap")
    assert rows == [["0.84", "70.0 ± 20.0", "74.0 ± 21.0", "+4.0 ± 1.0", "3 of 3", "ahead"]]
    _, rows = report.accuracies(part)
    assert rows == [["MP", "70.0 ± 20.0"], ["LAP", "**74.0 ± 21.0**"]]
