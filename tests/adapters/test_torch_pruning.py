# SPDX-License-Identifier: MIT
"""Torch-Pruning with lookahead squared norms; the oracle is Torch-Pruning itself.

Every weight of a copy gets a number of its own; one channel is pruned there; the numbers that are
gone say which weights the channel's importance must be the squared norm of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lap_ext

pytest.importorskip("torch_pruning", reason="the framework of this adapter")

import torch_pruning as tp

from lap_ext.adapters.torch_pruning import LookaheadImportance
from tests.helpers.torch_pruning_nets import (
    IMAGE,
    NETS,
    ROOTS,
    ROWS,
    Model,
    dense,
    gated,
    group_of,
    grouped,
    named,
    onto_itself,
    queries,
    removed_squared_norm,
    residual,
    tied,
)


@pytest.mark.parametrize(("make", "root"), ROOTS, ids=named)
def test_the_squared_norm_of_what_is_removed(make: Callable[[], Model], root: str) -> None:
    model, (x, _) = make(), NETS[make]
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    group = group_of(model, x, root)
    result = LookaheadImportance(model, x, normalizer=None)(group)
    scores = lap_ext.scores(model, x, layers="*")
    expected = [removed_squared_norm(model, x, root, [i], scores) for i in group[0].idxs]
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0.0
    )
    assert len(set(expected)) >= len(expected) // 2, "a test that tells channels apart"


def chain() -> nn.Sequential:
    sizes = ((3, 4), (4, 5), (5, 6), (6, 2))
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in sizes))


def test_by_what_the_product_of_layers_loses() -> None:
    """The definition: ||J - J without w||^2 of the three layers around w, for a chain of four."""
    model = chain()
    w = [layer.weight.detach().double() for layer in model]

    def lost(layer: int, row: int, col: int) -> Tensor:
        only = torch.zeros_like(w[layer])
        only[row, col] = w[layer][row, col]
        return (w[layer + 1] @ only @ w[layer - 1]).square().sum()

    rows = [sum(lost(1, c, i) for i in range(4)) for c in range(5)]
    cols = [sum(lost(2, o, c) for o in range(6)) for c in range(5)]
    group = group_of(model, torch.ones(1, 3), "1")
    result = LookaheadImportance(model, torch.ones(1, 3), normalizer=None)(group)
    torch.testing.assert_close(result, torch.stack(rows) + torch.stack(cols), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("root", "pairs"), [("a", 4), ("g", 2)])
def test_grouped_convolution(root: str, pairs: int) -> None:
    """Torch-Pruning takes the same channel out of each group: together that is what they cost."""
    model = grouped()
    result = LookaheadImportance(model, IMAGE, normalizer=None)(group_of(model, IMAGE, root))
    assert len(result) == 2 * pairs
    scores = lap_ext.scores(model, IMAGE)
    for i in range(pairs):
        expected = removed_squared_norm(model, IMAGE, root, [i, i + pairs], scores)
        assert float(result[i] + result[i + pairs]) == pytest.approx(expected, rel=1e-12)


def test_some_channels_in_any_order() -> None:
    """root_idxs are channels, not indices among those that are requested."""
    for make, root in ((dense, "a"), (residual, "c"), (onto_itself, "b")):
        model, (x, _) = make(), NETS[make]
        importance = LookaheadImportance(model, x, normalizer=None)
        every = importance(group_of(model, x, root))
        assert torch.equal(importance(group_of(model, x, root, [3, 0, 2])), every[[3, 0, 2]])
    model = dense()
    group = group_of(model, IMAGE, "a")
    group.items[1:] = [(dep, []) for dep, _ in group.items[1:]]  # not to be pruned with it
    rows = lap_ext.scores(model, IMAGE)["a"].double().square().sum((1, 2, 3))
    torch.testing.assert_close(LookaheadImportance(model, IMAGE, None)(group), rows)


def test_halves_that_go_together() -> None:
    """Both get what the pair costs, so as many are pruned as requested."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = gated()
        result = LookaheadImportance(model, ROWS)(group_of(model, ROWS, "b"))
        assert torch.equal(result[:5], result[5:]) and len(result[:5].unique()) == 5
        pruned(model, ROWS, 1, pruning_ratio=0.4)
        assert model.b.weight.shape == (6, 2) and model.head.weight.shape == (2, 3)
        best = LookaheadImportance(model, ROWS)(group_of(model, ROWS, "b", [1]))
        assert len(best) == 2, "pruning one takes its partner with it"


def pruned(model: Model, x: Any, steps: int, importance: Any = None, **options: Any) -> Any:
    importance = LookaheadImportance(model, x) if importance is None else importance
    pruner = tp.pruner.BasePruner(
        model, x, importance, iterative_steps=steps, ignored_layers=[model.head], **options
    )
    for _ in range(steps):
        pruner.step()
        model(**x) if isinstance(x, dict) else model(x)
    return pruner


@pytest.mark.parametrize("global_pruning", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("make", [*(n for n in NETS if n not in (gated, tied)), grouped], ids=named)
def test_pruners(make: Callable[[], Model], global_pruning: bool) -> None:
    """In two steps, and the model still runs and can be trained."""
    model, x = make(), NETS.get(make, (IMAGE, ""))[0]
    before = sum(p.numel() for p in model.parameters())
    out = model(x).shape
    pruned(model, x, 2, pruning_ratio=0.5, global_pruning=global_pruning)
    assert model(x).shape == out and sum(p.numel() for p in model.parameters()) < 0.8 * before
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_channels_of_least_importance_go() -> None:
    model = onto_itself()
    result = LookaheadImportance(model, ROWS)(group_of(model, ROWS, "a"))
    best = result.topk(3).indices.sort().values
    rows = model.a.weight.detach()[best]
    pruned(model, ROWS, 1, pruning_ratio=0.4)
    assert torch.equal(model.a.weight, rows)


def test_grouped_queries() -> None:
    """Keys and values belong to no single query channel: what counts is q's row and o's column."""
    x = ROWS
    model = queries()
    scores = {name: s.double().square() for name, s in lap_ext.scores(model, x).items()}
    expected = scores["q"].sum(1) + scores["o"].sum(0)
    graph = tp.DependencyGraph().build_dependency(model, x)
    group = graph.get_pruning_group(model.o, tp.prune_linear_in_channels, list(range(24)))
    result = LookaheadImportance(model, x, normalizer=None)(group)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0.0)
    heads = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.3}
    for options, q, k, width in (({}, 18, 6, 3), (heads, 16, 8, 4)):
        model = queries()
        num_heads = {model.q: 6, model.k: 2, model.v: 2}
        pruner = tp.pruner.BasePruner(
            model,
            x,
            LookaheadImportance(model, x),
            pruning_ratio=0.25,
            num_heads=num_heads,
            ignored_layers=[model.head],
            **options,
        )
        pruner.step()
        model.width = width
        assert model(x).shape == (1, 5, 2)
        assert (model.q.weight.shape[0], model.k.weight.shape[0]) == (q, k)


def test_scores_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace for each shape, one scoring for each pass, and none that is out of date."""
    calls: list[str] = []
    for name in ("trace", "scores"):
        real = getattr(lap_ext, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(lap_ext, name, counted)
    model = residual()
    importance = LookaheadImportance(model, IMAGE, normalizer=None)

    def check(expected: str) -> None:
        """Two groups, as a fresh importance has them, after so many calls."""
        calls.clear()
        groups = [group_of(model, IMAGE, root) for root in ("stem", "a")]
        result = [importance(group) for group in groups]
        assert " ".join(calls) == expected
        for group, mine in zip(groups, result, strict=True):
            assert torch.equal(mine, LookaheadImportance(model, IMAGE, normalizer=None)(group))

    check("trace scores")
    check("scores")  # groups again: a new pass
    model.bn.weight.data.mul_(3.0)  # not counted by torch
    check("scores")
    with torch.no_grad():
        model.c.weight.mul_(2.0)
    check("scores")
    group_of(model, IMAGE, "stem", [1, 4]).prune()
    check("trace scores")


def test_changes_within_a_pass() -> None:
    """Between two groups of one pass: in place, of a buffer, and of the parameter itself."""
    model = residual()

    def in_place() -> None:
        with torch.no_grad():
            model.c.weight.mul_(2.0)

    def anew() -> None:
        model.c.weight = nn.Parameter(model.c.weight.detach() * 2.0)

    for change in (in_place, lambda: model.bn2.running_var.mul_(4.0), anew, anew):
        importance = LookaheadImportance(model, IMAGE, normalizer=None)
        importance(group_of(model, IMAGE, "a"))
        before = LookaheadImportance(model, IMAGE, normalizer=None)(group_of(model, IMAGE, "c"))
        change()
        group = group_of(model, IMAGE, "c")
        result = importance(group)
        assert torch.equal(result, LookaheadImportance(model, IMAGE, normalizer=None)(group))
        assert not torch.equal(result, before)


@pytest.mark.parametrize(
    "name", ["mean", "sum", "max", "gaussian", "standarization", "lamp", "sentinel_0.5"]
)
def test_normalizers(name: str) -> None:
    """Torch-Pruning's own, whatever the size of the squared norms; nothing is divided by zero."""
    model, x = chain(), torch.ones(1, 3)
    group = group_of(model, x, "1")
    raw = LookaheadImportance(model, x, normalizer=None)(group)
    theirs = tp.importance.GroupMagnitudeImportance(normalizer=name)
    expected = theirs._normalize(raw.float() / raw.float().max(), name)
    result = LookaheadImportance(model, x, normalizer=name)(group)
    torch.testing.assert_close(result.float(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.argsort(), raw.argsort())
    for weight in model.parameters():
        weight.data.mul_(2.0**-12)  # squared norms 2^-72 of what they were
    assert torch.equal(LookaheadImportance(model, x, normalizer=name)(group), result)
    model[1].weight.data.zero_()
    model[2].weight.data.zero_()
    assert LookaheadImportance(model, x, normalizer=name)(group).tolist() == [0.0] * 5


def test_a_function_as_normalizer() -> None:
    model = residual()
    group = group_of(model, IMAGE, "stem")
    raw = LookaheadImportance(model, IMAGE, normalizer=None)(group)
    assert torch.equal(LookaheadImportance(model, IMAGE, normalizer=torch.sqrt)(group), raw.sqrt())


def test_options_of_scores_and_named_inputs() -> None:
    """Magnitudes give the plain squared norm of a group; batch norms change the scores."""
    model, named_inputs = residual(), {"x": IMAGE}
    group = group_of(model, IMAGE, "a")
    result = LookaheadImportance(model, named_inputs, None, criterion="magnitude")(group)
    expected = model.a.weight.square().sum((1, 2, 3)) + model.b.weight.square().sum((0, 2, 3))
    torch.testing.assert_close(result, expected.detach().double(), rtol=1e-6, atol=0.0)
    model.bn.weight.data.mul_(3.0)
    given: list[Tensor] = [
        LookaheadImportance(model, named_inputs, None, batch_norm=way)(group)
        for way in ("edge", "ignore")
    ]
    rows, cols = (
        lap_ext.scores(model, IMAGE, batch_norm="ignore")[name].double().square() for name in "ab"
    )
    expected = rows.sum((1, 2, 3)) + cols.sum((0, 2, 3))
    torch.testing.assert_close(given[1], expected, rtol=1e-12, atol=0.0)
    assert bool((given[0] > given[1]).all())
    pruned(model, named_inputs, 2, LookaheadImportance(model, named_inputs), pruning_ratio=0.5)
    assert model.stem.weight.shape[0] == 3


def test_groups_that_are_not_scored() -> None:
    """The outputs of an LSTM, which Torch-Pruning breaks; and groups without weights."""
    lstm = nn.LSTM(3, 4, batch_first=True)
    model = Model(lambda m, x: m.head(m.lstm(x)[0]), lstm=lstm, head=nn.Linear(4, 2))
    importance = LookaheadImportance(model, ROWS)
    assert importance(group_of(model, ROWS, "lstm")) is None
    with pytest.raises((IndexError, RuntimeError)):  # the day it works, the None can go
        group_of(model, ROWS, "lstm", [0]).prune()
        model(ROWS)
    model = Model(lambda m, x: m.norm(x), norm=nn.LayerNorm(3), head=nn.Linear(3, 1))
    graph = tp.DependencyGraph().build_dependency(model, ROWS, verbose=False)
    group = graph.get_pruning_group(model.norm, tp.prune_layernorm_out_channels, [0, 1, 2])
    assert LookaheadImportance(model, ROWS)(group) is None


class Own(tp.pruner.function.LinearPruner):
    """A pruner of the user's."""


def of_another_model() -> None:
    LookaheadImportance(residual(), IMAGE)(group_of(residual(), IMAGE, "stem"))


def older_than_the_pruning() -> None:
    model = residual()
    group = group_of(model, IMAGE, "stem")
    group_of(model, IMAGE, "stem", [0, 1, 2]).prune()
    LookaheadImportance(model, IMAGE)(group)


def split_by_an_old_pruner() -> None:
    pruned(gated(), ROWS, 2, pruning_ratio=0.5)


def with_a_pruner_of_its_own() -> None:
    model = onto_itself()
    own = {nn.Linear: Own()}
    graph = tp.DependencyGraph().build_dependency(model, ROWS, customized_pruners=own)
    group = graph.get_pruning_group(model.a, own[nn.Linear].prune_out_channels, [0, 1])
    LookaheadImportance(model, ROWS)(group)


def with_a_computed_weight() -> None:
    model = onto_itself()
    group = group_of(model, ROWS, "a")
    parametrizations.weight_norm(model.a)
    LookaheadImportance(model, ROWS)(group)


def with_hard_coded_sizes() -> None:
    model = Model(
        lambda m, x: m.head(m.a(x).reshape(1, 5, m.width)), a=nn.Linear(3, 4), head=nn.Linear(4, 2)
    )
    model.width = 4
    importance = LookaheadImportance(model, ROWS)
    group = group_of(model, ROWS, "a")
    importance(group)
    group_of(model, ROWS, "a", [0]).prune()
    importance(group)


def with_a_weight_that_is_no_number() -> None:
    model = onto_itself()
    model.b.weight.data[0, 0] = float("nan")
    LookaheadImportance(model, ROWS)(group_of(model, ROWS, "a"))


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (of_another_model, ValueError, "got stem (Conv2d(2, 6"),
    (
        older_than_the_pruning,
        ValueError,
        "has 3 channels), got index 5. Make a new group after each",
    ),
    (split_by_an_old_pruner, ValueError, "and a new pruner if the model splits channels (Torch"),
    (with_a_pruner_of_its_own, ValueError, "expected weights that are layers of the traced model"),
    (with_a_computed_weight, ValueError, "the pruner has; undo parametrizations; list a module"),
    (with_hard_coded_sizes, lap_ext.TopologyError, "If the pruned model has hard-coded sizes (the"),
    (with_a_weight_that_is_no_number, ValueError, "'b'"),
    (lambda: LookaheadImportance("net", ROWS), TypeError, "to be a torch.nn.Module, got str."),
    (lambda: LookaheadImportance(tied(), ROWS, "average"), ValueError, "None, got 'average'."),
    (lambda: LookaheadImportance(tied(), ROWS, "sentinel_x"), ValueError, "got 'sentinel_x'."),
    (lambda: LookaheadImportance(tied(), ROWS, 3), ValueError, "function or None, got 3."),
]


@pytest.mark.parametrize(("act", "error", "text"), REFUSED, ids=named)
def test_refused(act: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert text in str(caught.value)
