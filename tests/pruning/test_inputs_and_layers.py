# SPDX-License-Identifier: MIT
"""What prune, scores and Pruner are given: inputs of any kind, a ready trace, layer patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from tests.helpers.processes import run_python


class TwoInputs(nn.Module):
    """a(x) * scale, then b."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(self.a(x) * scale)


X, SCALE = torch.ones(2, 3), torch.ones(4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "inputs", [(X, SCALE), [X, SCALE], {"x": X, "scale": SCALE}, {"scale": SCALE, "x": X}], ids=str
)
def test_a_tuple_a_list_and_a_dict_are_the_same_inputs(inputs: Any) -> None:
    model = TwoInputs()
    found = lap_ext.scores(model, inputs)
    score = lap_ext.score(None, model.a.weight, model.b.weight)
    assert list(found) == ["a", "b"] and torch.equal(found["a"], score)
    assert list(lap_ext.trace(model, inputs).layers) == ["a", "b"]
    assert lap_ext.prune(model, inputs, 0.5, apply=False).kept == 10
    pruner = lap_ext.Pruner(model, inputs, lap_ext.one_shot(0.5))
    assert pruner.step().kept == 10


def test_a_trace_in_place_of_inputs() -> None:
    model = net()
    topology = lap_ext.trace(model, X)
    expected, found = lap_ext.scores(model, X), lap_ext.scores(model, topology=topology)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    result = lap_ext.prune(model, None, 0.5, topology=topology, apply=False)
    assert result.masks == lap_ext.prune(model, X, 0.5, apply=False).masks
    pruner = lap_ext.Pruner(model, None, lap_ext.one_shot(0.5), topology=topology)
    assert pruner.topology is topology


MISTAKES: dict[str, tuple[Callable[[nn.Module, Any], Any], type[Exception], str]] = {
    "a trace as inputs": (
        lambda m, t: lap_ext.prune(m, t, 0.5),
        TypeError,
        "^prune: expected example_inputs to be what .* got a Topology. Pass it as topology=, ",
    ),
    "both": (
        lambda m, t: lap_ext.scores(m, X, topology=t),
        TypeError,
        "^scores: expected topology alone .* got example_inputs too. Leave out",
    ),
    "neighbors of a trace": (
        lambda m, t: lap_ext.prune(m, None, 0.5, topology=t, neighbors={"0": (None, None)}),
        TypeError,
        "got neighbors too",
    ),
    "another's": (
        lambda m, t: lap_ext.prune(net()[:3], None, 0.5, topology=t),
        ValueError,
        "^prune: expected a topology traced from this model, .* got another structure: module '3'",
    ),
    "no inputs": (
        lambda m, t: lap_ext.prune(m, None, 0.5),
        lap_ext.TopologyError,
        r"^prune: expected inputs for Sequential\.forward\(input\), got 0 positional and no named",
    ),
    "a wrong name": (
        lambda m, t: lap_ext.prune(m, {"y": X}, 0.5),
        lap_ext.TopologyError,
        r"got 0 positional and \['y'\] named ones: .* or a dict of named ones",
    ),
    "no layer": (
        lambda m, t: lap_ext.prune(m, X, 0.5, layers=["0", "fc*"]),
        ValueError,
        r"^prune: expected layers patterns that name a layer, got 'fc\*'. The layers are 0, 2, 4.$",
    ),
    "no excluded layer": (
        lambda m, t: lap_ext.scores(m, X, exclude="fc"),
        ValueError,
        "^scores: expected exclude patterns that name a layer, got 'fc'.",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes(name: str) -> None:
    model = net()
    call, error, text = MISTAKES[name]
    with pytest.raises(error, match=text):
        call(model, lap_ext.trace(model, X))
    assert lap_ext.sparsity(model) == 0.0


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (None, (), ["0", "2", "4"]),
        ("2", (), ["2"]),
        (["4", "0"], (), ["0", "4"]),  # in the order of the network
        ("*", ["2"], ["0", "4"]),
        (["[02]"], "0", ["2"]),
        (["2"], ["2"], []),
        ([], (), []),
    ],
)
def test_layers_and_exclude(layers: Any, exclude: Any, expected: list[str]) -> None:
    model, options = net(), {"layers": layers, "exclude": exclude}
    assert list(lap_ext.scores(model, X, **options)) == expected
    assert list(lap_ext.prune(model, X, 0.5, apply=False, **options).masks) == expected
    pruner = lap_ext.Pruner(model, X, lap_ext.one_shot(0.5), **options)
    assert [layer.name for layer in pruner.layers] == expected


def test_other_layers_still_count_as_neighbors() -> None:
    model = net()
    alone = lap_ext.scores(model, X, layers="2")["2"]
    assert torch.equal(alone, lap_ext.scores(model, X)["2"])


def test_a_result_is_applied_to_the_model_and_to_a_copy() -> None:
    model, copy = net(), net()
    result = lap_ext.prune(model, X, 0.5, apply=False)
    assert lap_ext.sparsity(model) == 0.0
    for each in (model, copy):
        result.apply(each)
        assert lap_ext.sparsity(each) == 0.5
        assert torch.equal(each[0].weight != 0, result.masks["0"])
    with pytest.raises(ValueError, match=r"^PruneResult\.apply: expected masks that fit the model"):
        result.apply(nn.Linear(3, 4))


def test_sparsity_counts_weights_of_two_dimensions_or_more_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert lap_ext.sparsity(model) == 0.0  # biases of a norm are zeros, and do not count
    model[0].weight.data[0] = torch.tensor([0.0, -0.0, 0.0, 1.0])
    assert lap_ext.sparsity(model) == 3 / 16
    assert lap_ext.sparsity(nn.ReLU()) == 0.0
    with pytest.raises(TypeError, match=r"^sparsity: expected model to be a torch\.nn\.Module,"):
        lap_ext.sparsity(torch.ones(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^sparsity, layer '0': expected weights with data"):
        lap_ext.sparsity(nn.Sequential(nn.Linear(2, 2, device="meta")))


def test_tables_for_notebooks() -> None:
    model = net()
    page = lap_ext.prune(model, X, 0.5)._repr_html_()
    assert page.count("<tr>") == 5 and ">sparsity</th>" in page and ">50.00%</td>" in page
    page = lap_ext.trace(model, X)._repr_html_()
    assert page.count("<tr>") >= 4 and ">fed by</th>" in page


def test_scores_by_the_names_of_parameters() -> None:
    """In a packed attention, a layer's name is its parameter's: keys of two kinds, unless asked."""
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    x = torch.ones(1, 3, 4)
    by_layer, by_parameter = lap_ext.scores(block, x), lap_ext.scores(block, x, by="parameter")
    assert {"self_attn.in_proj_weight", "linear1"} <= set(by_layer)
    parameters = dict(block.named_parameters())
    assert set(by_parameter) <= set(parameters) and len(by_parameter) == len(by_layer)
    for (name, one), other in zip(by_parameter.items(), by_layer.values(), strict=True):
        assert torch.equal(one, other) and one.shape == parameters[name].shape
    with pytest.raises(ValueError, match="scores: expected by to be 'layer' or 'parameter'"):
        lap_ext.scores(block, x, by="name")  # type: ignore[arg-type]


def test_a_torch_without_numpy_prints_no_warning(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["numpy"] = None  # as if it were not installed
import lap_ext, torch
net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
result = lap_ext.prune(net, torch.ones(1, 4), 0.5)
result.masks.save({str(tmp_path / "masks")!r})
print(lap_ext.Masks.load({str(tmp_path / "masks")!r}, net))
"""
    done = run_python(code)
    assert (done.stdout, done.stderr) == (
        "Masks(2 layers, 9 of 18 weights kept, sparsity 0.5)\n",
        "",
    )
