# SPDX-License-Identifier: MIT
"""What prune does unless asked otherwise: no layer vanishes, zeros are pruned, embeddings stay."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def uneven() -> tuple[nn.Sequential, Tensor]:
    """Three layers, the middle one with weights a million times smaller than the others'."""
    net = mlp(6, 20, 20, 4)
    net[2].weight.data.mul_(1e-6)
    return net, torch.ones(1, 6)


def nonzeros(net: nn.Module) -> dict[str, int]:
    weights = {x: w for x, w in net.named_parameters() if w.dim() > 1}
    return {name.removesuffix(".weight"): int(w.count_nonzero()) for name, w in weights.items()}


# --- layers that vanish ---------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["lookahead", "magnitude"])
def test_a_global_ranking_is_by_lamp(criterion: str) -> None:
    net, x = uneven()
    given: dict[str, Any] = {"criterion": criterion, "scope": "global", "apply": False}
    result = lap_ext.prune(net, x, 0.9, **given)
    assert result.empty_layers == [] and min(row.kept for row in result.layers) > 0
    assert result.masks == lap_ext.prune(net, x, 0.9, normalize="lamp", **given).masks


def test_raw_scores_are_available_and_empty_layers_are_said_once() -> None:
    net, x = uneven()
    with pytest.warns(UserWarning, match=r"1 of 3 layers keep no weight: '2'\.") as warned:
        result = lap_ext.prune(net, x, 0.9, criterion="magnitude", scope="global", normalize="none")
    assert len(warned) == 1 and warned[0].filename == __file__
    assert result.empty_layers == ["2"] and nonzeros(net)["2"] == 0
    assert "EMPTY: 1 layers keep no weight: '2'." in str(result)
    assert "EMPTY" in result._repr_html_()
    assert json.loads(result.to_json())["empty_layers"] == ["2"]


def test_a_pruner_warns_of_a_layer_once() -> None:
    net, x = uneven()
    schedule = {0: 0.7, 1: 0.75, 2: 0.78}.get
    pruner = lap_ext.Pruner(
        net, x, schedule, criterion="magnitude", scope="global", normalize="none"
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        while pruner.step():
            pass
    assert [str(x.message).split(":")[0] for x in warned] == ["1 of 3 layers keep no weight"]


@pytest.mark.parametrize("min_keep", [7, 0.1])
@pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
def test_floors_of_one_ranking(normalize: Any, min_keep: float) -> None:
    """Each layer keeps its floor, the total is as asked, and the rest is the best of the rest."""
    net, x = uneven()
    given: dict[str, Any] = {"scope": "global", "normalize": normalize, "apply": False}
    result = lap_ext.prune(net, x, 0.8, min_keep=min_keep, **given)
    floors = {r.name: 7 if min_keep == 7 else -(-r.total // 10) for r in result.layers}
    assert all(row.kept >= floors[row.name] for row in result.layers)
    assert result.kept == 120
    scores = lap_ext.scores(net, x, normalize=normalize)
    lifted = {  # the oracle: the floor of each layer first, then the best of all others
        name: torch.where(lap_ext.topk_mask(s, keep=floors[name]), s.double() + 1e6, s.double())
        for name, s in scores.items()
    }
    masks = lap_ext.topk_mask(list(lifted.values()), keep=result.kept)
    assert all(torch.equal(result.masks[name], m) for name, m in zip(lifted, masks, strict=True))


def test_a_floor_by_layer() -> None:
    net, x = uneven()
    rows = lap_ext.prune(net, x, 0.95, min_keep=10, apply=False).layers
    assert [row.kept for row in rows] == [10, 20, 10]  # 5 % of 120, 400 and 80
    rows = lap_ext.prune(net, x, {"0": 0.95}, min_keep=10, apply=False).layers
    assert [row.kept for row in rows] == [10, 400, 80]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_keep": 1.5}, r"expected 0 <= min_keep <= 1 for a fraction, got 1\.5"),
        ({"min_keep": -1}, r"expected min_keep >= 0, got -1"),
        ({"min_keep": "5"}, r"expected min_keep to be a number of weights"),
        ({"min_keep": True}, r"expected min_keep to be a number of weights"),
        ({"min_keep": 50, "scope": "global"}, r"keeps 60 weights\), got one that needs 150 in 3"),
    ],
    ids=["fraction", "negative", "text", "bool", "too much"],
)
def test_floors_that_cannot_be(options: dict[str, Any], text: str) -> None:
    net, x = uneven()
    with pytest.raises((ValueError, TypeError), match=text):
        lap_ext.prune(net, x, 0.9, **options)


@pytest.mark.parametrize("sparsity", [1, 1.0, {"0": 1.0}, lap_ext.erk(1.0)], ids=str)
def test_everything_is_removed_only_on_request(sparsity: Any) -> None:
    net, x = uneven()
    with pytest.raises(ValueError, match=r"got 1, which sets every weight to zero.*min_keep=0"):
        lap_ext.prune(net, x, sparsity)
    assert nonzeros(net)["0"] == 120
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = lap_ext.prune(net, x, sparsity, min_keep=0)
    assert nonzeros(net)["0"] == 0 and "0" in result.empty_layers


# --- a model that is pruned already ---------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_zeros_count_as_pruned(scope: Any, rounds: int) -> None:
    net, x = mlp(50, 100, 100, 10), torch.ones(1, 50)
    first = lap_ext.prune(net, x, 0.97, scope=scope)
    before = {name: w.clone() for name, w in net.named_parameters()}
    assert first.kept == first.nonzero == 480
    again = lap_ext.prune(net, x, 0.5, scope=scope, rounds=rounds)
    assert again.kept == again.nonzero == 480  # nothing is lost, and nothing is said to be kept
    assert all(torch.equal(w, before[name]) for name, w in net.named_parameters())
    more = lap_ext.prune(net, x, 0.99, scope=scope, rounds=rounds)
    assert more.kept == sum(nonzeros(net).values()) == 160
    assert all(bool((first.masks[name] | ~more.masks[name]).all()) for name in more.masks)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_zeros_can_count_as_weights_but_live_ones_come_first(scope: Any) -> None:
    net, x = mlp(50, 100, 100, 10), torch.ones(1, 50)
    lap_ext.prune(net, x, 0.97, scope=scope)
    live = {name: w != 0 for name, w in net.named_parameters() if w.dim() > 1}
    result = lap_ext.prune(net, x, 0.5, scope=scope, masks={})
    assert (result.kept, result.nonzero, result.total) == (8000, 480, 16000)
    assert "Of the weights kept, 480 are not zero." in str(result)
    assert all(bool((result.masks[n.removesuffix(".weight")] | ~m).all()) for n, m in live.items())


def test_a_nonzero_weight_is_kept_before_a_zero_one_of_the_same_score() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[0.0, 0.0, 1.0, 2.0], [3.0, 0.0, 4.0, 5.0]])
    net[1].weight.data = torch.tensor([[0.0, 1.0]])  # the first output is dead: scores are 0
    mask = lap_ext.prune(net, torch.ones(1, 4), {"0": 0.375}, apply=False, masks={}).masks["0"]
    assert mask.tolist() == [[False, False, True, True], [True, False, True, True]]


def test_a_layer_that_is_all_zero_is_left_as_it_is() -> None:
    net, x = mlp(6, 20, 20, 4), torch.ones(1, 6)
    net[4].weight.data.zero_()  # a head that begins at zero
    with pytest.warns(UserWarning, match=r"All scores are 0 in '2'.*ranked by magnitude"):
        result = lap_ext.prune(net, x, 0.5)
    assert list(result.masks) == ["0", "2"] and result.left_dense == {"4": "all zero"}
    kept = net[2].weight[result.masks["2"]].abs()
    dropped = lap_ext.prune(mlp(6, 20, 20, 4), x, 0.5, criterion="magnitude", apply=False)
    assert torch.equal(result.masks["2"], dropped.masks["2"]) and kept.numel() == 200


class Masked(nn.Linear):
    """The paper's own layers: a weight times a mask, in the forward."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.register_buffer("mask", torch.ones(out, into))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def test_a_layer_of_zeros_with_a_mask_of_its_own() -> None:
    net = nn.Sequential(Masked(4, 6), nn.ReLU(), Masked(6, 3))
    net[2].weight.data.zero_()
    with pytest.warns(UserWarning, match="All scores are 0 in '0'"):
        result = lap_ext.prune(net, torch.ones(1, 4), 0.5)
    assert list(result.masks) == ["0"] and result.left_dense == {"2": "all zero"}


def test_gradients_that_are_all_zero() -> None:
    """Before a head that begins at zero, each gradient is 0: magnitude, with a warning."""
    net, x = mlp(6, 20, 4), torch.ones(2, 6)
    net[2].weight.data.zero_()
    data = [(x, torch.tensor([0, 1]))]
    with pytest.warns(UserWarning, match="All scores are 0 in '0'.*ranked by magnitude"):
        result = lap_ext.prune(net, x, 0.5, criterion="weight_gradient", data=data)
    weight = mlp(6, 20, 4)[0].weight
    assert torch.equal(result.masks["0"], lap_ext.topk_mask(weight.abs(), keep=60))


def test_a_pruner_knows_what_it_left() -> None:
    """Zeros of a layer that is named later, and layers of zeros, also after loading."""
    net, x = mlp(6, 20, 20, 4), torch.ones(1, 6)
    net[4].weight.data.zero_()
    with torch.no_grad():
        net[2].weight[10:] = 0
    schedule = [{"0": 0.5}, {"0": 0.5, "2": 0.4}].__getitem__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = lap_ext.Pruner(net, x, schedule, criterion="magnitude")
        pruner.step(), pruner.step()
        assert pruner.result.layers[1].kept == pruner.result.layers[1].nonzero == 200
        assert pruner.result.left_dense == {"4": "all zero"}
        again = lap_ext.Pruner(net, x, schedule, criterion="magnitude")
        again.load_state_dict(pruner.state_dict())
    assert again.result.left_dense == {"4": "all zero"}


@pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
def test_a_dead_layer_in_one_ranking(normalize: Any) -> None:
    """Raw scores of 0 rank last, as they are; others are ranked by magnitude; both say so."""
    net, x = mlp(6, 20, 20, 4), torch.ones(1, 6)
    net[4].weight.data.zero_()
    given: dict[str, Any] = {"scope": "global", "normalize": normalize, "apply": False}
    with pytest.warns(UserWarning, match="All scores are 0 in '2'"):
        result = lap_ext.prune(net, x, 0.9, min_keep=0, **given)
    assert result.kept == 52
    if normalize == "none":
        assert result.layers[1].kept == 0
    if normalize == "lamp":  # the mask within the layer is that of magnitude
        kept = net[2].weight.abs()[result.masks["2"]].min()
        assert bool(net[2].weight.abs()[~result.masks["2"]].max() <= kept)


# --- what stays dense -----------------------------------------------------------------------------


class Language(nn.Module):
    """Tokens and positions, a hidden layer, and a head: tied to the tokens, or of its own."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(30, 8), nn.Embedding(5, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        place = self.positions(torch.arange(x.shape[1]))
        return self.head(self.hidden(self.tokens(x) + place).relu())


TOKENS = torch.ones(1, 5, dtype=torch.int64)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads_stay_dense(tied: bool) -> None:
    net = Language(tied)
    result = lap_ext.prune(net, TOKENS, 0.5)
    assert list(result.masks) == ["hidden"] == list(lap_ext.scores(net, TOKENS))
    reason = {"tokens": "tied to an embedding"} if tied else {"tokens": "embedding"}
    head = {} if tied else {"head": "output head"}
    assert result.left_dense == reason | {"positions": "embedding"} | head
    assert result.notes()[0].startswith("Left dense: ")
    assert "Name them with layers to prune them" in str(result)
    removed = 32 / sum(p.numel() for p in net.parameters())
    assert f"of the model, {removed:.2%} were removed" in str(result)


def test_a_name_includes_them() -> None:
    net = Language(False)
    assert list(lap_ext.prune(net, TOKENS, 0.5, layers=["tokens", "hidden"]).masks) == [
        "tokens",
        "hidden",
    ]
    every = lap_ext.prune(Language(False), TOKENS, 0.5, layers="*")
    assert len(every.masks) == 4 and every.left_dense == {}
    some = lap_ext.prune(Language(False), TOKENS, 0.5, exclude="head")
    assert set(some.left_dense) == {"tokens", "positions"}  # an excluded layer is no default
    with pytest.raises(ValueError, match=r"'tok\*', which names tokens\. .* unless layers= names"):
        lap_ext.prune(net, TOKENS, {"tok*": 0.5})


def test_a_classifier_is_no_output_head() -> None:
    net = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(40, 7))
    assert list(lap_ext.prune(net, TOKENS, 0.5).masks) == ["2"]


class Branches(nn.Module):
    """Two branches, of which inputs may reach one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image = nn.Linear(4, 6), nn.Linear(9, 6)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        y = self.words(x)
        return y if image is None else y + self.image(image)


def test_what_the_inputs_do_not_reach_is_said() -> None:
    x = torch.ones(1, 4)
    result = lap_ext.prune(Branches(), x, 0.5)
    assert result.unreached == ("image.weight",) and list(result.masks) == ["words"]
    assert "Not reached by the example inputs, so dense: 'image.weight'." in str(result)
    assert "Of all 90 parameters of the model, 13.33% were removed." in str(result)
    assert json.loads(result.to_json())["unreached"] == ["image.weight"]
    both = lap_ext.prune(Branches(), (x, torch.ones(1, 9)), 0.5)
    assert both.unreached == () and "Not reached" not in str(both)


def test_what_modules_compute_and_memory_that_is_shared_is_reached() -> None:
    norms = nn.utils.parametrizations.weight_norm, nn.utils.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.Sequential(*(norm(nn.Linear(6, 6)) for norm in norms), nn.Linear(6, 6))
        other = nn.Linear(6, 6)
    net.append(other)
    other.weight.data = net[2].weight.data
    topology = lap_ext.trace(net, torch.ones(1, 6))
    assert topology.unreached == ()
    for sparsity in (0.5, 0.75):  # the masks that the first pruning has registered fit
        result = lap_ext.prune(net, None, sparsity, topology=topology)
        assert list(result.masks) == ["0", "1", "2"] and result.kept == 108 * (1 - sparsity)
    pruner = lap_ext.Pruner(net, None, lap_ext.one_shot(0.9), topology=topology)
    assert list(lap_ext.scores(net, topology=pruner.topology)) == ["0", "1", "2"]
