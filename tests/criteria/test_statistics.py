# SPDX-License-Identifier: MIT
"""Statistics of data in a file: the same bits as from the data; errors name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import criteria

INPUTS = torch.zeros(1, 5)
NAMES = ("wanda", "lookahead_act", "weight_gradient", "obd", "obd_lookahead")
WORDS = {"wanda": "mean_square", "lookahead_act": "active_fraction", "weight_gradient": "gradient"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "global"},
    {"scope": "global", "normalize": "none"},
    {"scope": "global", "normalize": "norm"},
    {"rounds": 2},
    {"order": "forward"},
    {"order": "backward", "rounds": 2},
]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A chain with a layer that no activation follows."""
    torch.manual_seed(2)
    layers = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Linear(7, 6), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(6, 3)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 5).to(dtype), torch.randint(0, 3, (n,))) for n in (4, 3)]


def of(name: str) -> criteria.CriterionLike:
    if name.startswith("obd"):
        pytest.importorskip("backpack")
    return name


def written(path: Path, name: str, **edits: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Writes what a criterion measures on the batches to a file."""
    tensors = criteria.measure(net(), INPUTS, of(name), batches())
    for edit in edits.values():
        edit(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_the_bits_of_its_data(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "statistics", name)
    given: dict[str, Any] = {"criterion": of(name), "apply": False}
    for options in OPTIONS:
        want = lap_ext.prune(net(), INPUTS, 0.6, data=batches(), **given, **options)
        for data in (path, str(path)):
            got = lap_ext.prune(net(), INPUTS, 0.6, data=data, **given, **options)
            assert got.masks == want.masks, options
    scores = lap_ext.scores(net(), INPUTS, criterion=of(name), data=batches())
    found = lap_ext.scores(net(), INPUTS, criterion=of(name), data=path)
    assert all(torch.equal(found[layer], x) for layer, x in scores.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES[:3])
def test_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, data, x = net(dtype), batches(dtype), INPUTS.to(dtype)
    save_file(criteria.measure(model, x, name, data), tmp_path / "statistics")
    want = lap_ext.scores(model, x, criterion=name, data=data)
    found = lap_ext.scores(model, x, criterion=name, data=tmp_path / "statistics")
    assert all(torch.equal(found[layer], s) and s.dtype == found[layer].dtype
               for layer, s in want.items())  # fmt: skip


def test_a_pruner_takes_a_file(tmp_path: Path) -> None:
    """Before each pruning, the same statistics: those of the dense model."""
    path = written(tmp_path / "statistics", "wanda")
    model = net()
    schedule = lap_ext.schedule.linear(0.5, start=1, end=3)
    pruner = lap_ext.Pruner(model, INPUTS, schedule, criterion="wanda", data=path)
    for _ in range(5):
        pruner.step()
    assert round(pruner.masks.sparsity, 2) == 0.5
    with pytest.raises(ValueError, match=r"^Pruner: expected data for criterion 'wanda' \(batches"):
        lap_ext.Pruner(net(), INPUTS, schedule, criterion="wanda")


# --- names ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A weight that is used twice, with other inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.into, self.both = nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(self.both(self.into(x)).relu())


def test_names_and_values() -> None:
    """Of each use of a weight, against what hooks see; one number where no activation follows."""
    model, data = Tied(), [torch.randn(9, 5)]
    seen: list[Tensor] = []
    hook = model.both.register_forward_hook(lambda _module, x, _out: seen.append(x[0].detach()))
    model(data[0])
    hook.remove()
    found = criteria.measure(model, INPUTS, "wanda", data)
    assert sorted(found) == ["both.mean_square", "both.mean_square.1", "into.mean_square"]
    for suffix, x in zip(("", ".1"), seen, strict=True):
        want = x.double().square().mean(0)
        torch.testing.assert_close(found[f"both.mean_square{suffix}"], want)
    found = criteria.measure(model, INPUTS, criteria.LookaheadAct(), data)
    assert sorted(found) == [
        "both.active_fraction",
        "both.active_fraction.1",
        "into.active_fraction",
    ]
    torch.testing.assert_close(found["both.active_fraction"], (seen[1] > 0).double().mean(0))
    assert found["into.active_fraction"].tolist() == found["both.active_fraction.1"].tolist() == 1


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_tied_weight(name: str, tmp_path: Path) -> None:
    model, data = Tied(), [torch.randn(9, 5)]
    tensors = criteria.measure(model, INPUTS, name, data)
    save_file(tensors, tmp_path / "statistics")
    want = lap_ext.scores(model, INPUTS, criterion=name, data=data)
    found = lap_ext.scores(model, INPUTS, criterion=name, data=tmp_path / "statistics")
    assert all(torch.equal(found[layer], x) for layer, x in want.items())
    second = f"both.{WORDS[name]}.1"
    del tensors[second]
    save_file(tensors, tmp_path / "statistics")
    with pytest.raises(ValueError, match=f"^scores: expected '{second}' in data, got a file with"):
        lap_ext.scores(model, INPUTS, criterion=name, data=tmp_path / "statistics")


def test_a_criterion_of_ones_own(tmp_path: Path) -> None:
    """Its statistics have names of its own."""

    class Mean(criteria.DataCriterion):
        name = "mean"

        def measure(self, topology: lap_ext.Topology, data: Any) -> dict[str, Tensor]:
            means = torch.stack(list(data)).mean()
            return {f"{name}.mean": means.expand(x.shape) for name, x in topology.layers.items()}

        def weight(self, network: Any, chunk: Any) -> Tensor:
            return chunk.weight * network.statistics.of_chunk(chunk, "mean")

    data = [torch.tensor(2.0), torch.tensor(4.0)]
    tensors = criteria.measure(net(), INPUTS, Mean(), data)
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "statistics")
    for given in (data, tmp_path / "statistics"):
        found = lap_ext.scores(net(), INPUTS, Mean(), data=given)
        assert torch.equal(found["0"], 3 * net()[0].weight.detach().abs())


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[:3])
def test_files_that_are_none(name: str, tmp_path: Path) -> None:
    missing, damaged = tmp_path / "missing", tmp_path / "damaged"
    damaged.write_bytes(written(tmp_path / "statistics", name).read_bytes()[:-5])
    for path, error, text in (
        (
            missing,
            FileNotFoundError,
            f"expected data to be batches, or a .*, got '{missing}'. lap_",
        ),
        (tmp_path, FileNotFoundError, f"expected data to be batches, or a .*, got '{tmp_path}'. "),
        (damaged, ValueError, "expected a complete safetensors file of statistics in data, got .*"),
    ):
        with pytest.raises(error, match=f"^prune: {text}"):
            lap_ext.prune(net(), INPUTS, 0.5, criterion=name, data=path)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_statistic(name: str, tmp_path: Path) -> None:
    word = WORDS.get(name, "hessian")
    path = written(tmp_path / "statistics", name, less=lambda x: x.pop(f"2.{word}"))
    text = rf"^prune(, layer '2')?: expected '2\.{word}' in data, got a file without\. Write "
    with pytest.raises(ValueError, match=text):
        lap_ext.prune(net(), INPUTS, 0.5, criterion=of(name), data=path)


def test_the_file_of_another_criterion(tmp_path: Path) -> None:
    path = written(tmp_path / "statistics", "wanda")
    for name in ("lookahead_act", "weight_gradient"):
        text = rf"^prune(, layer '0')?: expected '0\.{WORDS[name]}' in data, got a file without\."
        with pytest.raises(ValueError, match=text):
            lap_ext.prune(net(), INPUTS, 0.5, criterion=name, data=path)


WRONG: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: x.new_ones(*x.shape, 2), r"'0\.{}' of shape \[.*\] in data, got \[.*, 2\]"),
    (lambda x: x.new_ones(4), r"'0\.{}' of shape \[.*\] in data, got \[4\]"),
    (lambda x: x.long(), r"finite floating-point values of '0\.{}' in data, got torch.int64"),
    (lambda x: x * torch.nan, r"finite floating-point values of '0\.{}' in data, got inf or NaN"),
    (lambda x: x.new_full(x.shape, torch.inf), r"finite .* of '0\.{}' in data, got inf or NaN"),
    (lambda x: x - 1e9, r"'0\.{}' >= 0 in data, got -1e\+09"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_statistic(name: str, case: int, tmp_path: Path) -> None:
    """Its name, and what is wrong with it; nothing is changed."""
    word, (edit, text) = WORDS.get(name, "hessian"), WRONG[case]
    if name == "weight_gradient" and ">= 0" in text:
        pytest.skip("gradients have signs")
    key = f"0.{word}"
    path = written(tmp_path / "statistics", name, new=lambda x: x.update({key: edit(x[key])}))
    model = net()
    with pytest.raises(ValueError, match=r"^prune(, layer '0')?: expected " + text.format(word)):
        lap_ext.prune(model, INPUTS, 0.5, criterion=of(name), data=path)
    assert all(torch.equal(x, net().state_dict()[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["lookahead", "magnitude", "random"])
def test_a_criterion_that_reads_no_data(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "statistics", "wanda")
    for data, kind in ((path, "PosixPath"), (str(path), "str"), (batches(), "list")):
        with pytest.raises(ValueError, match=f"^prune: expected no data .*'{name}', .* got {kind}"):
            lap_ext.prune(net(), INPUTS, 0.5, criterion=name, data=data)
    with pytest.raises(ValueError, match=f"criterion to be one that reads data, got '{name}'"):
        criteria.measure(net(), INPUTS, name, batches())


@pytest.mark.parametrize("name", NAMES)
def test_without_data(name: str) -> None:
    with pytest.raises(ValueError, match=f"^prune: expected data for criterion '{name}' .* a file"):
        lap_ext.prune(net(), INPUTS, 0.5, criterion=name)


def test_a_frozen_weight_is_told_from_a_missing_one(tmp_path: Path) -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"weights that require grad .*, got a frozen one"):
        lap_ext.scores(model, INPUTS, "weight_gradient", data=batches())
    tensors = criteria.measure(model, INPUTS, "weight_gradient", batches())
    assert sorted(tensors) == ["0.gradient", "3.gradient", "5.gradient"]
    save_file(tensors, tmp_path / "statistics")
    given: dict[str, Any] = {"criterion": "weight_gradient", "data": tmp_path / "statistics"}
    with pytest.raises(ValueError, match=r"expected '2\.gradient' in data, got a file without"):
        lap_ext.scores(model, INPUTS, **given)
    assert sorted(lap_ext.scores(model, INPUTS, **given, exclude="2")) == ["0", "3", "5"]


def test_a_file_is_read_by_rows(tmp_path: Path) -> None:
    """The chunk of a layer gets the rows of its own, and no others are read."""
    from lap_ext.criteria.statistics.measured import StatisticsFile
    from lap_ext.places import Chunk

    path = written(tmp_path / "statistics", "weight_gradient")
    layer = lap_ext.trace(net(), INPUTS).layers["2"]
    full, file = load_file(path)["2.gradient"], StatisticsFile(path)
    for first, count in ((0, 56), (0, 8), (8, 24), (48, 8), (3, 10)):
        chunk = Chunk.of(layer, torch.zeros(count), first)
        found = file.of_chunk(chunk, "gradient")
        assert found is not None and found.shape == chunk.weight.shape
        assert torch.equal(found.flatten(), full.flatten()[first : first + count])
    assert file.of_chunk(chunk, "hessian") is None and file.get("2.hessian") is None
