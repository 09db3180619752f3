# SPDX-License-Identifier: MIT
"""checkpoint.inspect: layers, neighbors, zeros and bytes of a checkpoint, as of its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import reading
from lap_ext.checkpoint.inspecting import InspectedLayer, inspect_model
from lap_ext.pruning.reporting import neighbors
from lap_ext.topology.edges import Edge, Pairs
from tests.helpers.checkpoints import INPUTS, change, network, saved, write


def inspect(directory: Path, **options: Any) -> checkpoint.Inspection:
    """Runs checkpoint.inspect on network()."""
    return checkpoint.inspect(directory, **{"model": network(), "example_inputs": INPUTS} | options)


@pytest.mark.parametrize("chunk", [64, 1 << 24])
def test_rows(dense: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(reading, "CHUNK", chunk)
    change(dense, "0.weight", lambda weight: weight[:3].fill_(0.0))
    change(dense, "3.weight", lambda weight: weight[-1, -2:].fill_(-0.0))
    result = inspect(dense)
    rows = [
        (x.name, x.kind, x.shape, x.dtype, x.weights, x.zeros, x.fed_by, x.read_by)
        for x in result.layers
    ]
    assert rows == [
        ("0", "linear", (150, 6), "float32", 900, 18, ("input",), ("3",)),
        ("3", "linear", (70, 150), "float32", 10500, 2, ("0",), ("5",)),
        ("5", "linear", (9, 70), "float32", 630, 0, ("3",), ("output",)),
    ]
    assert result.layers[0].sparsity == 0.02
    assert (result.weights, result.zeros) == (12030, 20)
    assert result.bytes == sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    assert str(result).splitlines()[2].split() == [
        "0",
        "linear",
        "150x6",
        "900",
        "2.00%",
        "input",
        "3",
    ]
    assert str(result).splitlines()[-2].split() == ["all", "12,030", "0.17%"]
    assert str(result).splitlines()[-1] == f"{result.bytes:,} bytes"


def test_for_json(dense: Path) -> None:
    told = inspect(dense).to_dict()
    assert list(told) == ["bytes", "structure", "weights", "zeros", "layers", "others", "stops"]
    assert told["structure"] is None
    assert told["layers"][2] == {
        "name": "5",
        "kind": "linear",
        "shape": [9, 70],
        "dtype": "float32",
        "weights": 630,
        "zeros": 0,
        "sparsity": 0.0,
        "fed_by": ["3"],
        "read_by": ["output"],
    }


@pytest.mark.parametrize("name", ["hf_llama_sdpa", "hf_gpt2_sdpa", "hf_qwen3_moe"])
def test_a_checkpoint_and_its_module_have_the_same_rows(name: str, tmp_path: Path) -> None:
    model, inputs = saved(name, tmp_path / "dense")
    if name == "hf_qwen3_moe":
        model.set_experts_implementation("batched_mm")  # as the zoo has it: eager does not export
    result = checkpoint.inspect(tmp_path / "dense")
    expected = inspect_model(lap_ext.trace(model, inputs))
    assert result.layers == expected.layers
    assert list(result.topology.others) == list(expected.topology.others)
    assert expected.bytes == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def test_others_and_stops_are_told(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.table = nn.Parameter(torch.zeros(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft(self.fc(x)).real + self.table

    source, inputs = write(tmp_path / "dense", Net().state_dict()), torch.ones(3, 3)
    with pytest.raises(lap_ext.TopologyError):
        inspect(source, model=Net(), example_inputs=inputs)
    with pytest.warns(UserWarning, match="lap_ext can follow"):
        both = (
            inspect(source, model=Net(), example_inputs=inputs, on_unsupported="cut"),
            inspect_model(lap_ext.trace(Net(), inputs, on_unsupported="cut")),
        )
    for result in both:
        assert list(result.topology.others) == ["table"] and len(result.topology.stops) == 1
        assert "no layers, never pruned: table" in str(result)
        assert f"stopped at: {result.topology.stops[0]}" in str(result)
        assert result._repr_html_().startswith("<table>")
        assert "<p>no layers, never pruned: table</p>" in result._repr_html_()
        assert result.to_dict()["stops"] == list(result.topology.stops)


def test_names_of_neighbors() -> None:
    def edge(name: str, shift: int = 0, kind: str = "layer") -> Edge:
        here = torch.arange(2)
        return Edge(name, kind, (), lambda: Pairs(here, here + shift, None))

    assert neighbors([]) == ()
    assert neighbors([edge("a"), edge("b", 5, "input"), edge("a")]) == ("a", "b")
    said = neighbors([edge("a", 2), edge("b", kind="coupled")])
    assert said == ("a (offset +2)", "coupled with b")


def many(names: list[str]) -> checkpoint.Inspection:
    """A layer with a long name that all the named ones read."""
    name = "model.language_model.layers.11.self_attn.q_proj"
    row = InspectedLayer(name, "linear", (8, 8), "float32", 64, 0, ("input",), tuple(names))
    return checkpoint.Inspection(lap_ext.trace(nn.Linear(2, 2), torch.ones(1, 2)), [row], 256)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_table_fits_the_terminal(width: int) -> None:
    """The middle of names is left out, lists are wrapped; JSON and wide tables have everything."""
    names = [f"model.language_model.layers.{n}.block_sparse_moe.experts" for n in range(6)]
    inspection = many(names)
    table = inspection.table(width)
    assert max(map(len, table.splitlines())) <= width
    assert "model.l" in table and "q_proj" in table and "..." in table
    assert "and 2 more" in table and "and 2 more" in str(inspection)
    wide = inspection.table(most=100)
    assert all(name in wide for name in names) and "more" not in wide
    assert inspection.to_dict()["layers"][0]["read_by"] == names


def test_progress_adds_up(dense: Path) -> None:
    for work in (
        lambda seen: inspect(dense, on_progress=seen.append),
        lambda seen: inspect_model(lap_ext.trace(network(), INPUTS), seen.append),
    ):
        seen: list[checkpoint.Progress] = []
        work(seen)
        assert [(x.step, x.name) for x in seen] == [("count zeros", name) for name in "035"]
        assert seen[-1].done == seen[-1].total == 4 * 12030


def test_mistakes_name_this_function(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint.inspect: expected a checkpoint directory"):
        inspect(tmp_path / "no")
    with pytest.raises(ValueError, match=r"^checkpoint.inspect: expected example_inputs"):
        inspect(dense, example_inputs=None)
