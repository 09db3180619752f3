# SPDX-License-Identifier: MIT
"""checkpoint.scores gives the scores of lap_ext.scores, bit for bit, layer by layer; its file."""

from __future__ import annotations

import math
import os
import re
import shutil
from bisect import bisect_right
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import lap_ext
from lap_ext import _files, checkpoint
from lap_ext.checkpoint import stream
from lap_ext.criteria.context import Network
from lap_ext.pruning.figures import figures
from lap_ext.pruning.scoring import Scorer
from tests.helpers.checkpoints import INPUTS, change, least_memory, network, saved, write
from tests.helpers.parameters import each_dtype

OPTIONS: dict[str, dict[str, Any]] = {
    "lookahead": {},
    "norm": {"normalize": "norm"},
    "lamp": {"normalize": "lamp"},
    "magnitude": {"criterion": "magnitude"},
    "lookback": {"criterion": "lookback"},
    "lookforward": {"criterion": "lookforward", "normalize": "lamp"},
    "random": {"criterion": lap_ext.criteria.Random(3)},
    "layers": {"layers": ["3", "5"], "exclude": "5"},
    "exclude": {"exclude": ["3"]},
    "fold": {"batch_norm": "fold"},
}


def scores(directory: Path, **options: Any) -> checkpoint.ScoreStream:
    """Runs checkpoint.scores on network()."""
    return checkpoint.scores(directory, **{"model": network(), "example_inputs": INPUTS} | options)


def collected(stream: checkpoint.ScoreStream) -> dict[str, Tensor]:
    return {layer.name: values for layer, values in stream}


def same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names in the same order, dtypes and bits."""
    assert list(result) == list(expected)
    for name, values in expected.items():
        assert result[name].dtype == values.dtype and torch.equal(result[name], values), name


def quantile(values: list[float], tenths: float) -> float:
    """The first of the sorted values that so many tenths of all do not exceed."""
    ordered = sorted(values)
    return next(x for x in ordered if 10 * bisect_right(ordered, x) >= tenths * len(ordered))


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_those_in_memory(name: str, dense: Path) -> None:
    result = scores(dense, **OPTIONS[name])
    expected = lap_ext.scores(network(), INPUTS, **OPTIONS[name])
    assert [layer.name for layer in result.layers] == list(expected)
    assert list(result.dtypes) == [values.dtype for values in expected.values()]
    same(collected(result), expected)
    same(collected(result), expected)  # each iteration is a pass of its own


@each_dtype
@pytest.mark.parametrize("name", ["lookahead", "norm", "random"])
def test_dtypes(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    net, inputs = network(dtype), INPUTS.to(dtype)
    source = write(tmp_path / "dense", net.state_dict())
    result = scores(source, model=net, example_inputs=inputs, **OPTIONS[name])
    expected = lap_ext.scores(net, inputs, **OPTIONS[name])
    same(collected(result), expected)
    assert list(result.dtypes) == [values.dtype for values in expected.values()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hf_llama_sdpa", {}),
        ("hf_llama_sdpa", {"normalize": "norm", "criterion": "magnitude", "exclude": "lm_*"}),
        ("hf_gpt2_sdpa", {"normalize": "lamp"}),
        ("hf_qwen3_moe", {}),
    ],
    ids=str,
)
def test_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Layers, tied embeddings, and experts that are stored one by one."""
    model, inputs = saved(name, tmp_path / "dense")
    if name == "hf_qwen3_moe":
        model.set_experts_implementation("batched_mm")  # as the zoo has it: eager does not export
    before = {path: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
    result = collected(checkpoint.scores(tmp_path / "dense", **options))
    same(result, lap_ext.scores(model, inputs, **options))
    assert {path: path.read_bytes() for path in (tmp_path / "dense").iterdir()} == before


def test_norms_are_read_where_they_are_needed(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "measure", lambda *_: pytest.fail("nothing asks for norms"))
    collected(scores(dense, criterion="magnitude"))


def test_one_layer_is_in_memory(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed before it is requested."""
    scored: list[str] = []
    real = Scorer.of

    def noted(self: Any, chunk: Any) -> Any:
        scored.append(chunk.layer.name)
        return real(self, chunk)

    monkeypatch.setattr(Scorer, "of", noted)
    result = scores(dense)
    assert scored == []
    for index, (layer, _) in enumerate(result):
        assert scored == [x.name for x in result.layers[: index + 1]] and scored[-1] == layer.name


def test_small_memory(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go by a few at a time, with the same bits."""
    counts: list[int] = []
    of = Scorer.of

    def counted(self: Any, chunk: Any) -> Any:
        counts.append(chunk.weight.numel())
        return of(self, chunk)

    monkeypatch.setattr(Scorer, "of", counted)
    with pytest.raises(ValueError, match=r"^checkpoint.scores: expected memory of [\d,]+ bytes or"):
        scores(dense, memory="3KB")
    few = least_memory(lambda few: scores(dense, memory=few))
    held = 4 * (6 * 150 + 150 * 70)  # of the two largest layers in a row
    with pytest.raises(
        ValueError,
        match=rf"^checkpoint.scores: expected memory of {few:,} bytes or more \({held:,} bytes of "
        rf"scores of two layers, a row of layer '3' and the norms of all channels must fit\), got ",
    ):
        scores(dense, memory=few - 1)
    same(collected(scores(dense, memory=few)), lap_ext.scores(network(), INPUTS))
    counts.clear()
    result = collected(scores(dense, memory=150_000))
    assert max(counts) < 150 * 70 and len(counts) > 5
    same(result, lap_ext.scores(network(), INPUTS))


def test_progress_adds_up(dense: Path) -> None:
    seen: list[checkpoint.Progress] = []
    for _ in range(2):
        seen.clear()
        collected(scores(dense, on_progress=seen.append))
        assert list(dict.fromkeys(x.step for x in seen)) == ["measure", "score"]
        for step in ("measure", "score"):
            told = [x for x in seen if x.step == step]
            assert [x.name for x in told] == ["0", "3", "5"]
            assert told[-1].done == told[-1].total == 4 * 12030


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": "obd"}, "checkpoint.scores: expected data for criterion 'obd' (a file of"),
        (
            {"normalize": "all"},
            "checkpoint.scores: expected normalize to be 'auto', 'none', 'norm'",
        ),
        ({"memory": "much"}, "checkpoint.scores: expected memory such as"),
        ({"exclude": "x*"}, "checkpoint.scores: expected exclude patterns that name a layer"),
        ({"layers": "x*"}, "checkpoint.scores: expected layers patterns that name a layer"),
        ({"example_inputs": None}, "checkpoint.scores: expected example_inputs with model"),
    ],
    ids=str,
)
def test_mistakes_name_this_function(options: dict[str, Any], said: str, dense: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        scores(dense, **options)
    with pytest.raises(TypeError, match=r"^checkpoint.scores: expected model to be a torch.nn.Mod"):
        scores(dense, model=3)


def test_damaged_checkpoints(dense: Path) -> None:
    change(dense, "3.weight", lambda weight: weight[0, 0].fill_(torch.nan))
    result = scores(dense)  # no weight is read yet
    with pytest.raises(ValueError, match=r"^checkpoint.scores: expected finite .* in layer '3'"):
        collected(result)
    os.truncate(dense / "model-00002-of-00002.safetensors", 3000)
    with pytest.raises(ValueError, match=r"^checkpoint.scores: .* Download it again"):
        scores(dense)


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
def test_figures(dense: Path, normalize: str) -> None:
    expected = lap_ext.scores(network(), INPUTS, normalize=normalize)
    table = scores(dense, normalize=normalize).table()
    assert [row.name for row in table.layers] == list(expected)
    for row in table.layers:
        values = expected[row.name].double().flatten().tolist()
        names = {"min": 1e-9, "10%": 1, "median": 5, "90%": 9, "max": 10}
        assert row.quantiles == {name: quantile(values, tenths) for name, tenths in names.items()}
        assert row.squared_norm == pytest.approx(math.fsum(x * x for x in values), rel=1e-12)
        assert (row.weights, row.zeros) == (len(values), values.count(0.0))
        assert row.dtype == str(expected[row.name].dtype).removeprefix("torch.")


def test_figures_of_a_layer_without_weights_and_of_infinite_scores() -> None:
    layer: Any = type("Layer", (), {"name": "no", "kind": "linear", "shape": (0, 3)})
    row = figures(layer, torch.zeros(0, 3))
    assert (row.quantiles["median"], row.squared_norm, row.weights) == (None, 0.0, 0)
    table = str(checkpoint.ScoreTable([row]))
    assert table.splitlines()[2].split() == ["no", "0x3", "0", "0.00%", "0"]
    row = figures(layer, torch.tensor([[1.0, math.inf]]))
    assert (row.quantiles["max"], row.squared_norm) == (math.inf, math.inf)
    assert '<td style="text-align:right">inf</td>' in checkpoint.ScoreTable([row])._repr_html_()
    told = row.to_dict()
    assert (told["quantiles"]["max"], told["quantiles"]["min"], told["squared_norm"]) == (
        "inf",
        1,
        "inf",
    )


# --- the file -------------------------------------------------------------------------------------


def test_save(dense: Path, tmp_path: Path) -> None:
    result = scores(dense, criterion="lookback", normalize="norm", batch_norm="ignore")
    table = result.save(tmp_path / "s")
    same(load_file(tmp_path / "s"), collected(result))
    assert table == result.table()
    head = int.from_bytes((tmp_path / "s").read_bytes()[:8], "little")
    assert head % 8 == 0  # the tensors are aligned
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.metadata() == {
            "lap_ext": lap_ext.__version__,
            "criterion": "lookback",
            "normalize": "norm",
            "batch_norm": "ignore",
        }


def test_save_scores_of_a_module(tmp_path: Path) -> None:
    net = network()
    topology = lap_ext.trace(net, INPUTS)
    expected = lap_ext.scores(net, topology=topology)
    result = checkpoint.ScoreStream.of_model(topology, expected, {"criterion": "lookahead"})
    result.save(tmp_path / "s")
    same(load_file(tmp_path / "s"), expected)


def test_a_name_that_the_file_cannot_hold(tmp_path: Path) -> None:
    net = nn.Module()
    net.register_module("__metadata__", nn.Linear(2, 2))
    layer: Any = type("Layer", (), {"name": "__metadata__", "shape": (2, 2)})
    result = checkpoint.ScoreStream([layer], [torch.float32], lambda: iter([torch.ones(2, 2)]), {})
    with pytest.raises(ValueError, match="layer names that a safetensors file can hold"):
        result.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_save_makes_a_new_file_elsewhere(dense: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in dense.iterdir()}
    result = scores(dense)
    for path, kind, said in (
        (dense / "tokenizer.json", OSError, "save: expected path to be a new file, got"),
        (dense / "s", ValueError, "save: expected path outside of"),
        (dense / ".." / "dense" / "s", ValueError, "save: expected path outside of"),
        (tmp_path / "no" / "s", OSError, "save: expected path in a directory that exists, got"),
    ):
        with pytest.raises(kind, match=said):
            result.save(path)
    assert {path: path.read_bytes() for path in dense.iterdir()} == before
    assert list(tmp_path.iterdir()) == [dense]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_half_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    rows: list[Any] = []

    def fail(*given: Any) -> Any:
        rows.append(given)
        if len(rows) == 2:  # the first layer is in the file
            raise error
        return figures(*given)

    monkeypatch.setattr(stream, "figures", fail)
    with pytest.raises(error):
        scores(dense).save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == [dense]


def test_full_disk_is_known_before(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    monkeypatch.setattr(_files, "_beside", None)  # not even begun
    with pytest.raises(
        ValueError, match=r"save: expected [\d,]+ bytes on the disk of .*, got 100 "
    ):
        scores(dense).save(tmp_path / "s")
