# SPDX-License-Identifier: MIT
"""What cannot be followed is refused by name, with the way out; and the ways out, by hand."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.nn.utils import prune

import lap_ext
from tests.helpers.networks import Net, randomized

ROWS, TOKENS, IMAGES = torch.randn(2, 6), torch.randn(2, 5, 6), torch.randn(2, 3, 4, 4)
INDEX = torch.tensor([2, 0, 1])
EXPECTED = "expected operations that lap_ext can follow, got"
CURE = (
    "Pass neighbors={'a': (previous, next), ...} for the layers around it, or "
    'on_unsupported="cut" to count it as a boundary (factor 1).'
)


def linear(out: int = 6, into: int = 6) -> nn.Linear:
    return nn.Linear(into, out)


def into_zeros(x: Tensor, index: Any) -> Tensor:
    y = x.new_zeros(2, 6)
    y[:, index] = x
    return y


def switched(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def text_of(error: Any) -> str:
    """The text of an error or a warning, with HERE for the line of the forward."""
    message = str(error.value) if hasattr(error, "value") else str(error)
    return re.sub(r"networks\.py:\d+", "HERE", message)


# operation -> its function of what layer a makes
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.fft_fft.default": lambda x: torch.fft.fft(x).real,
    "aten.cumsum.default": lambda x: x.cumsum(1),
    "aten.cumprod.default": lambda x: x.cumprod(1),
    "aten.as_strided.default": lambda x: x.as_strided((2, 3), (6, 1)),
    "aten.avg_pool1d.default": lambda x: F.avg_pool1d(x[:, None], 2)[:, 0],
    "aten.max_pool1d.default": lambda x: F.max_pool1d(x[:, None], 2)[:, 0],
    "aten.upsample_nearest1d.vec": lambda x: F.interpolate(x[:, None], scale_factor=2)[:, 0],
    "aten.repeat_interleave.self_Tensor": lambda x: x.repeat_interleave(torch.ones(6).long(), 1),
    "aten.masked_select.default": lambda x: x.masked_select(torch.ones(6) > 0).view(2, 6),
    "aten.quantile.scalar": lambda x: x.quantile(0.5, dim=1, keepdim=True),
    "aten.scatter.src": lambda x: torch.zeros(2, 6).scatter(1, x.argsort(1)[:, :3], x[:, :3]),
    "aten.scatter_add.default": lambda x: torch.zeros(2, 6).scatter_add(1, INDEX.expand(2, 3),
                                                                        x[:, :3]),
    "aten.scatter_reduce.two": lambda x: x.scatter_reduce(1, INDEX.expand(2, 3), x[:, :3], "sum"),
    "aten.index_add.default": lambda x: torch.zeros(2, 6).index_add(1, INDEX, x[:, :3]),
    "aten.index_copy.default": lambda x: x.index_copy(1, x.sum(0).argsort()[:3], x[:, :3]),
    "aten.index_put.default": lambda x: into_zeros(x[:, :3], x.sum(0).argsort()[:3]),
    "aten.scatter.value_reduce": lambda x: x.scatter(1, INDEX.expand(2, 3), 2.0, reduce="multiply"),
    "aten.tril.default": lambda x: x.tril(),
    "aten.put.default": lambda x: torch.zeros(2, 6).put(torch.arange(12), x),
    "aten.kron.default": lambda x: torch.kron(x, torch.ones(1, 2)),
    "aten.einsum.default": lambda x: torch.einsum("nc,cc->nc", x, torch.ones(6, 6)),
    "aten.cdist.default": lambda x: torch.cdist(x, torch.ones(4, 6)),
    "aten.remainder.Scalar": lambda x: x % 2,
    "cond": switched,
}  # fmt: skip


@pytest.mark.parametrize("operation", list(REFUSED))
def test_operations_refused_by_name(operation: str) -> None:
    """The full text: the layer, the operation, the line of the source, both cures."""
    width = REFUSED[operation](torch.randn(2, 6)).shape[1]
    model = Net(lambda m, x: m.b(m.function(m.a(x))), a=linear(), b=linear(2, width))
    model.function = REFUSED[operation]
    with pytest.raises(lap_ext.TopologyError) as error:
        lap_ext.trace(model, ROWS)
    assert text_of(error) == f"trace: {EXPECTED} {operation}, fed by layer 'a' (HERE). {CURE}"


def picked(part: Callable[[Tensor], Tensor]) -> nn.Module:
    """A layer that uses a part of a weight, between two others."""
    rule = lambda m, x: m.b(F.linear(m.a(x), part(m.w)))  # noqa: E731
    w = nn.Parameter(torch.randn(6, 6))
    model = Net(rule, a=linear(), w=w)
    model.b = linear(2, len(part(w)))
    return model


PICKED = (
    "expected a weight that is used whole or in one block (weight[a:b, c:d]) in "
    "aten.linear.default, got rows or columns picked from one (networks.py:"
)
OTHERS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "two_layers": (lambda: Net(lambda m, x: torch.fft.fft(m.b(x) + m.a(x)).real, a=linear(),
                               b=linear()),
                   ROWS, "got aten.fft_fft.default, fed by layers 'b' and 'a' (networks.py:"),
    "many_layers": (
        lambda: Net(lambda m, x: torch.fft.fft(sum(b(x) for b in m.b)).real,
                    b=nn.ModuleList(linear() for _ in range(5))),
        ROWS, "got aten.fft_fft.default, fed by layers 'b.0', 'b.1', 'b.2' and 2 more ("),
    "in_a_module": (lambda: nn.Sequential(linear(),
                                          nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2))),
                    ROWS, "got aten.max_pool1d.default in module '1.1', fed by layer '0'. Pass"),
    "of_the_input": (lambda: Net(lambda m, x: m.a(torch.fft.fft(x).real), a=linear()), ROWS,
                     "got aten.fft_fft.default, fed by the model's input (networks.py:"),
    "every_other_row": (lambda: picked(lambda w: w[::2]), ROWS, PICKED),
    "rows_by_index": (lambda: picked(lambda w: w[[4, 0, 2]]), ROWS, PICKED),
    "repeated_row": (lambda: picked(lambda w: w[:1].expand(3, 6)), ROWS, PICKED),
    "computed_operand": (
        lambda: Net(lambda m, x: m.b(torch.einsum("nc,oc->no", m.a(x), m.w @ m.v)), a=linear(),
                    w=nn.Parameter(torch.ones(3, 2)), v=nn.Parameter(torch.ones(2, 6)),
                    b=linear(2, 3)),
        ROWS, "got aten.einsum.default, with a weight of shape [3, 6] that is computed from 'w', "
              "'v' (networks.py:"),
    "added_at_places": (lambda: Net(lambda m, x: m.b(torch.zeros(2, 6).index_put(
        (torch.arange(2)[:, None], INDEX), m.a(x)[:, :3], accumulate=True)), a=linear(),
                                    b=linear()),
        ROWS, "got aten.index_put.default, fed by layer 'a' (networks.py:"),
    "computed_weight": (lambda: Net(lambda m, x: F.linear(m.a(x), m.w @ m.w.t()), a=linear(),
                                    w=nn.Parameter(torch.ones(6, 2))),
                        ROWS,
                        "got aten.linear.default, with a weight of shape [6, 6] that is computed "
                        "from 'w' (networks.py:"),
    "not_for_export": (lambda: Net(lambda m, x: m.a(x).numpy(), a=linear()), ROWS,
                       "trace: expected a model that torch.export can follow with these "
                       "example_inputs, got "),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
def test_models_refused_by_name(name: str) -> None:
    build, x, text = OTHERS[name]
    with pytest.raises(lap_ext.TopologyError, match=re.escape(text)):
        lap_ext.trace(build(), x)


@pytest.mark.parametrize("name", ["rows_by_index", "repeated_row", "computed_operand"])
def test_the_ways_out_that_an_error_names(name: str) -> None:
    """Scores without the weight in question: its neighbors end there, or are what is given."""
    build, x, _ = OTHERS[name]
    model = build()
    with pytest.warns(UserWarning, match=r"\(networks\.py:\d+\): it counts as a boundary"):
        cut = lap_ext.scores(model, x, on_unsupported="cut")
    given = lap_ext.scores(model, x, neighbors={"a": (None, None), "b": (None, None)})
    assert cut.keys() == given.keys() == {"a", "b"}
    torch.testing.assert_close(cut, given)


def test_permanent_weights_are_followed() -> None:
    layer = prune.random_unstructured(linear(), "weight", 0.5)
    prune.remove(layer, "weight")
    assert list(lap_ext.trace(nn.Sequential(layer, linear(2)), ROWS).layers) == ["0", "1"]


# ---- the ways out -----------------------------------------------------------------------------
def around_fft() -> nn.Module:
    rule = lambda m, x: m.c(F.relu(m.b(torch.fft.fft(m.a(x)).real)))  # noqa: E731
    return randomized(Net(rule, a=linear(4), b=linear(3, 4), c=linear(2, 3))).double()


def test_stopping_counts_one_on_both_sides() -> None:
    model = around_fft()
    a, b, c = (getattr(model, name).weight.detach().abs() for name in "abc")
    with pytest.warns(UserWarning) as warned:
        topology = lap_ext.trace(model, ROWS.double(), on_unsupported="cut")
    (text,) = topology.stops
    assert [str(w.message) for w in warned] == [text]
    assert text_of(text) == (
        f"{EXPECTED} aten.fft_fft.default, fed by layer 'a' (HERE): "
        "it counts as a boundary (factor 1)."
    )
    assert str(topology).endswith(f"stopped at: {text}")
    assert [(e.name, e.kind) for e in topology.layers["a"].next] == [("fft_fft", "boundary")]
    assert [(e.name, e.kind) for e in topology.layers["b"].prev] == [("fft_fft", "boundary")]
    with pytest.warns(UserWarning, match="fft_fft"):
        scores = lap_ext.scores(model, ROWS.double(), on_unsupported="cut")
    expected = {
        "a": a,  # 1 * 1
        "b": b * c.norm(dim=0)[:, None],  # 1 on the side of the boundary
        "c": c * b.norm(dim=1),
    }
    torch.testing.assert_close(scores, expected)


def test_stopping_where_nothing_is_unknown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            lap_ext.trace(nn.Sequential(linear(), linear()), ROWS, on_unsupported="cut").stops == []
        )


def test_stopping_at_a_computed_weight() -> None:
    """It is no layer; its producer ends there."""
    rule = lambda m, x: m.b(F.linear(m.a(x), m.w @ m.w.t()))  # noqa: E731
    model = Net(rule, a=linear(), b=linear(2), w=nn.Parameter(torch.ones(6, 2)))
    with pytest.warns(UserWarning, match="a weight of shape"):
        topology = lap_ext.trace(model, ROWS, on_unsupported="cut")
    assert list(topology.layers) == ["a", "b"] and topology.others == ["w"]
    assert [edge.kind for edge in topology.layers["a"].next] == ["boundary"]


def test_neighbors_bridge_what_is_unknown() -> None:
    model = around_fft()
    a, b, c = (getattr(model, name).weight.detach().abs() for name in "abc")
    known = {"a": (None, "b"), "b": ("a", ["c"])}
    scores = lap_ext.scores(model, ROWS.double(), neighbors=known)
    expected = {
        "a": a * b.norm(dim=0)[:, None],
        "b": b * a.norm(dim=1) * c.norm(dim=0)[:, None],
        "c": c * b.norm(dim=1),
    }
    torch.testing.assert_close(scores, expected)
    with_tensors = {"a": (None, model.b.weight), "b": (model.a.weight, model.c.weight)}
    torch.testing.assert_close(
        lap_ext.scores(model, ROWS.double(), neighbors=with_tensors), expected
    )
    twice = {"a": (None, ["b", "b"]), "b": (None, "c")}  # squares add
    result = lap_ext.scores(model, ROWS.double(), neighbors=twice)
    torch.testing.assert_close(result["a"], 2**0.5 * expected["a"])
    torch.testing.assert_close(result["b"], b * c.norm(dim=0)[:, None])


def test_neighbors_where_all_is_known() -> None:
    """They replace the result of the trace, of this layer alone."""
    model = randomized(nn.Sequential(linear(4), nn.ReLU(), linear(3, 4))).double()
    scores = lap_ext.scores(model, ROWS.double(), neighbors={"0": (None, None)})
    torch.testing.assert_close(scores["0"], model[0].weight.detach().abs())
    torch.testing.assert_close(scores["2"], lap_ext.scores(model, ROWS.double())["2"])


def test_neighbors_are_needed_on_both_sides() -> None:
    model = around_fft()
    after = re.escape(
        "trace: expected neighbors for layer 'b' too (it reads the result of fft_fft, which "
        "lap_ext "
        "cannot follow), got none. Pass neighbors={'b': (previous, next), ...}."
    )
    with pytest.raises(lap_ext.TopologyError, match=after):
        lap_ext.trace(model, ROWS.double(), neighbors={"a": (None, "b")})
    with pytest.raises(
        lap_ext.TopologyError, match=r"got aten\.fft_fft\.default, fed by layer 'a'"
    ):
        lap_ext.trace(model, ROWS.double(), neighbors={"b": ("a", "c")})


def test_neighbors_of_every_layer_that_is_fed_to_it() -> None:
    rule = lambda m, x: m.c(torch.fft.fft(m.a(x) + m.b(x)).real)  # noqa: E731
    model = Net(rule, **{name: linear() for name in "abc"})
    known = {"a": (None, "c"), "c": (["a", "b"], None)}
    with pytest.raises(
        lap_ext.TopologyError, match=r"got aten\.fft_fft\.default, fed by layers 'a' and 'b'"
    ):
        lap_ext.trace(model, ROWS, neighbors=known)
    assert lap_ext.trace(model, ROWS, neighbors=known | {"b": (None, "c")}).stops == []


WRONG_NEIGHBORS: dict[str, tuple[Any, str]] = {
    "no_pair": ({"0": "2"}, "trace: expected neighbors['0'] to be (previous, next), got str."),
    "three": ({"0": (None, None, None)},
              "trace: expected neighbors['0'] to be (previous, next), got tuple."),
    "a_key": ({"features.o": (None, None)},
              "trace: expected neighbors to name layers of the model, got 'features.o'."),
    "hint": ({"0": (None, "2.weight")}, "got '2.weight'. Did you mean '2'?"),
    "in_a_list": ({"0": (None, ["2", ["4"]])},
                  "expected neighbors to name layers of the model, got '4'."),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG_NEIGHBORS))
def test_wrong_neighbors(name: str) -> None:
    neighbors, text = WRONG_NEIGHBORS[name]
    model = nn.Sequential(linear(4), nn.ReLU(), linear(2, 4))
    with pytest.raises(ValueError, match=re.escape(text)):
        lap_ext.trace(model, ROWS, neighbors=neighbors)


def test_neighbors_that_do_not_meet() -> None:
    model = nn.Sequential(linear(4), nn.ReLU(), linear(2, 4))
    with pytest.raises(ValueError, match=re.escape("got w_next [4, 6] and w [4, 6]")):
        lap_ext.scores(model, ROWS, neighbors={"0": (None, "0")})


# ---- arguments --------------------------------------------------------------------------------
def test_wrong_arguments_of_trace() -> None:
    model = nn.Sequential(linear(4), nn.ReLU(), linear(2, 4))
    with pytest.raises(
        TypeError, match=r"trace: expected model to be a torch.nn.Module, got function\."
    ):
        lap_ext.trace(lambda x: x, ROWS)
    with pytest.raises(
        ValueError, match=r"trace: expected on_unsupported to be 'raise' or 'cut', got 'skip'\."
    ):
        lap_ext.trace(model, ROWS, on_unsupported="skip")
    with pytest.raises(
        lap_ext.TopologyError, match=r"got RuntimeError: a and b must have same reduction dim"
    ):
        lap_ext.trace(model, torch.randn(2, 9))
    with pytest.raises(
        lap_ext.TopologyError, match=r"inputs for Sequential\.forward\(input\), got 2 positional"
    ):
        lap_ext.trace(model, (ROWS, ROWS))
    with pytest.raises(
        lap_ext.TopologyError, match=r"\['input', 'mask'\] named ones: got an unexpected keyword"
    ):
        lap_ext.trace(model, {"input": ROWS, "mask": ROWS})
    assert issubclass(lap_ext.TopologyError, ValueError)


MASK = torch.ones(4, 6, dtype=torch.bool)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scope": ({"scope": "all"}, ValueError, "expected scope to be 'layer' or 'global', got 'all'."),
    "order": ({"order": "up"}, ValueError,
              "expected order to be 'parallel', 'forward' or 'backward', got 'up'."),
    "normalize": ({"normalize": "l2"}, ValueError,
                  "expected normalize to be 'auto', 'none', 'norm' or 'lamp', got 'l2'."),
    "batch_norm": ({"batch_norm": "on"}, ValueError,
                   "expected batch_norm to be 'edge', 'fold' or 'ignore', got 'on'."),
    "rounds": ({"rounds": 0}, ValueError, "expected rounds >= 1, got 0."),
    "rounds_type": ({"rounds": 1.5}, TypeError, "expected rounds to be an integer, got float."),
    "exclude": ({"exclude": ["head*"]}, ValueError,
                "expected exclude patterns that name a layer, got 'head*'. The layers are 0, 2."),
    "both": ({"scope": "global", "order": "forward"}, ValueError,
             'expected order="parallel" with scope="global" (one ranking needs all scores at '
             'once), got order=\'forward\''),
    "mask_name": ({"masks": {"1": MASK}}, ValueError,
                  "expected masks of the model's layers, got one for '1'."),
    "mask_shape": ({"masks": {"2": MASK}}, ValueError, "got masks['2'] [4, 6] and weight [2, 4]."),
    "mask_dtype": ({"masks": {"0": MASK.float()}}, TypeError,
                   "expected a bool masks['0'] (True: may be kept)"),
    "criterion": ({"criterion": "best"}, ValueError, "expected criterion to be one of lookahead"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_options(name: str) -> None:
    """Of prune, and of scores where it has them; the model stays as it was."""
    options, error, text = WRONG[name]
    model = nn.Sequential(linear(4), nn.ReLU(), linear(2, 4))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(
        error, match=re.escape(f"prune: {text}" if text.startswith("exp") else text)
    ):
        lap_ext.prune(model, ROWS, 0.5, **options)
    if not options.keys() & {"scope", "order", "rounds"}:
        with pytest.raises(
            error, match=re.escape(f"scores: {text}" if text.startswith("exp") else text)
        ):
            lap_ext.scores(model, ROWS, **options)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_topology_of_another_model() -> None:
    one, other = (nn.Sequential(linear(4), nn.ReLU(), linear(n, 4)) for n in (2, 3))
    with pytest.raises(ValueError, match=r"prune: expected a topology traced from this model"):
        lap_ext.prune(other, None, 0.5, topology=lap_ext.trace(one, ROWS))


HOW: list[dict[str, Any]] = [{}, {"order": "forward"}, {"order": "backward"}, {"rounds": 3},
                             {"scope": "global"}, {"criterion": "magnitude"},
                             {"batch_norm": "fold"}]  # fmt: skip


@pytest.mark.parametrize(
    "options", HOW, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)
@pytest.mark.parametrize("layer", ["0", "3"])
def test_nothing_is_changed_when_a_weight_is_not_finite(
    options: dict[str, Any], layer: str
) -> None:
    model = randomized(nn.Sequential(linear(4), nn.BatchNorm1d(4), nn.ReLU(), linear(2, 4)))
    with torch.no_grad():
        model.get_parameter(f"{layer}.weight")[1, 2] = torch.nan
    before = {key: x.clone() for key, x in model.state_dict().items()}
    text = f"prune: expected finite weights in layer '{layer}', got 1 non-finite values"
    with pytest.raises(ValueError, match=text):
        lap_ext.prune(model, ROWS.double(), 0.5, **options)
    for key, x in model.state_dict().items():
        torch.testing.assert_close(x, before[key], rtol=0, atol=0, equal_nan=True)


def test_nothing_is_changed_when_a_model_is_refused() -> None:
    model = around_fft().train()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(lap_ext.TopologyError):
        lap_ext.prune(model, ROWS.double(), 0.5)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
