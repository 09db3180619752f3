# SPDX-License-Identifier: MIT
"""Which units across layers go: every budget, floor, multiple and tie against plain sorting.

The worth of each unit is tested in test_coupled_worth.py, and is taken from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext import allocation
from lap_ext.errors import LapTypeError, LapValueError
from tests.helpers import choice_oracle as oracle
from tests.helpers import topologies, unit_oracle
from tests.helpers.cut_place import Cut, every_row, masks_of
from tests.helpers.networks import Net
from tests.helpers.unit_nets import KINDS, NETS, bound, mlp

CASES = [(name, kind) for name in NETS for kind in KINDS.get(name, ("channel",))]


def gone(topology: lap_ext.Topology, kind: str, result: lap_ext.PruneResult) -> set[int]:
    """The groups of which everything is masked; no other weight may be masked."""
    names = {x.name: x.parameter for x in topology.layers.values()}
    vectors = {x.removesuffix(".weight"): x for x, _ in topology.model.named_parameters()}
    masks = {names.get(name, vectors.get(name, name)): mask for name, mask in result.masks.items()}
    covered = unit_oracle.covered(masks)
    removed, wanted = set[int](), set[unit_oracle.Weight]()
    for group in topology.groups(kind):
        own = unit_oracle.weights_of(group, topology.model)
        if own <= covered:
            removed.add(group.number)
            wanted |= own
    assert covered == wanted
    return removed


def worths(topology: lap_ext.Topology, kind: str, aggregate: str = "energy") -> list[float]:
    """The worth of each group, by the definition."""
    scores = lap_ext.scores(topology.model, None, topology=topology, layers="*", by="parameter")
    groups = topology.groups(kind)
    return [unit_oracle.worth(x, topology.model, scores, aggregate) for x in groups]


def prune(topology: lap_ext.Topology, kind: str, sparsity: Any, **how: Any) -> lap_ext.PruneResult:
    """Prunes without changing the model."""
    return lap_ext.prune(
        *(topology.model, None, sparsity), topology=topology, structure=kind, apply=False, **how
    )


def pools(topology: lap_ext.Topology, kind: str, **how: Any) -> list[oracle.Pool]:
    """The pools of all families, each by itself."""
    worth = worths(topology, kind, "mean" if how.get("mean") else "energy")
    return [oracle.pool_of([x], worth, **how) for x in topology.groups(kind).families]


@pytest.mark.parametrize("sparsity", [0.25, 0.7, 1.0])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_family_loses_the_same_fraction(name: str, kind: str, sparsity: float) -> None:
    topology = bound(name)
    own = pools(topology, kind)
    result = prune(topology, kind, sparsity)
    wanted = oracle.by_layer(own, dict.fromkeys((x.name for x in own), sparsity))
    assert gone(topology, kind, result) == wanted
    for row, pool in zip(result.families, own, strict=True):
        keep = max(oracle.kept_of(sparsity, len(pool.units)), 1)
        classes = row.total // len(pool.units)
        assert (row.kept, row.total) == (keep * classes, len(pool.units) * classes)


@pytest.mark.parametrize(
    ("normalize", "aggregate"), [("none", "energy"), ("norm", "mean"), ("lamp", "energy")]
)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_ranking_of_all_families(name: str, kind: str, normalize: str, aggregate: str) -> None:
    topology = bound(name)
    own = pools(topology, kind, mean=aggregate == "mean")
    own = [oracle.normalized(pool, normalize) for pool in own]
    how = {"scope": "global", "normalize": normalize, "aggregate": aggregate}
    result = prune(topology, kind, 0.6, **how)
    assert gone(topology, kind, result) == oracle.together(own, 0.6)


def test_a_dict_of_patterns() -> None:
    topology = bound("mlp")
    own = pools(topology, "channel")
    result = prune(topology, "channel", {"0": 0.5, "2": 0.3})
    assert gone(topology, "channel", result) == oracle.by_layer(own, {"0": 0.5, "2": 0.3})
    result = prune(topology, "channel", {"2": 0.3})
    assert gone(topology, "channel", result) == oracle.by_layer(own, {"0": 0.0, "2": 0.3})
    residual = bound("residual")  # a family of two layers: a pattern of one of them counts
    result = prune(residual, "channel", {"last": 0.5, "*": 0.2})
    assert [(x.name, x.kept) for x in result.families] == [("first and 1 more", 4), ("inner", 4)]
    for wrong in ({"4": 0.5}, {"nothing": 0.5}):
        with pytest.raises(LapValueError):
            prune(topology, "channel", wrong)


@pytest.mark.parametrize("given", [Fraction(1, 10), Decimal("0.1"), 0.1, {"0": Decimal("0.1")}])
def test_numbers_are_taken_for_what_they_are(given: Any) -> None:
    """Of 5 units, a tenth is one half: it is rounded up, but 0.1 is a little more than a tenth."""
    topology = traced_mlp(3, 5, 2)
    result = prune(topology, "channel", given)
    assert [x.kept for x in result.families] == [4 if given == 0.1 else 5]
    result = prune(traced_mlp(3, 10, 2), "channel", given, cost="weights")
    assert [x.kept for x in result.families] == [9]


def test_a_dict_of_patterns_with_costs() -> None:
    topology = bound("mlp")
    result = prune(topology, "channel", {"0": 0.5, "2": 0.3}, cost="weights")
    assert [(x.kept, x.total) for x in result.families] == [(4, 9), (4, 7)]


def equal_worth(name: str) -> lap_ext.Topology:
    """All units of a family are worth the same."""
    topology = bound(name)
    with torch.no_grad():
        for x in topology.model.parameters():
            x.fill_(1.0)
    return topology


def test_of_equal_units_the_lower_number_is_kept() -> None:
    topology = equal_worth("mlp")
    result = prune(topology, "channel", 0.5)
    assert gone(topology, "channel", result) == {5, 6, 7, 8} | {13, 14, 15}
    result = prune(topology, "channel", 0.5, scope="global", normalize="norm")
    worth = [len(x.units) for x in pools(topology, "channel")]
    assert worth == [9, 7]  # the first family's units have the smaller share: they go first
    assert gone(topology, "channel", result) == set(range(1, 9))


def test_of_equal_units_of_two_families_those_of_the_later_go_first() -> None:
    topology = traced_mlp(4, 6, 6, 6, 4)
    with torch.no_grad():
        for x in topology.model.parameters():
            x.fill_(1.0)
    worth = worths(topology, "channel")
    assert worth[6] == worth[11] > worth[0] == worth[17]  # 0 to 5, 6 to 11, 12 to 17
    result = prune(topology, "channel", 4 / 18, scope="global", normalize="none")
    assert gone(topology, "channel", result) == {14, 15, 16, 17}


def traced_mlp(*widths: int) -> lap_ext.Topology:
    """A new one with random values."""
    return lap_ext.trace(mlp(*widths), torch.randn(1, widths[0]))


FLOORS: list[tuple[Any, Callable[[int], int]]] = [
    (None, lambda n: 1),
    (0, lambda n: 0),
    (3, lambda n: min(3, n)),
    (100, lambda n: n),
    (0.3, lambda n: math.ceil(Fraction(3, 10) * n)),
    (1.0, lambda n: n),
]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("min_keep", "least"), FLOORS)
def test_floors(min_keep: Any, least: Callable[[int], int], scope: Any) -> None:
    topology = bound("grouped")
    own = pools(topology, "channel", least=least)
    how = {"scope": scope, "normalize": "none", "min_keep": min_keep}
    sizes = [len(x.units) for x in own]
    assert sizes == [4, 2, 6]
    if scope == "layer":
        wanted = oracle.by_layer(own, dict.fromkeys((x.name for x in own), 0.9))
        assert gone(topology, "channel", prune(topology, "channel", 0.9, **how)) == wanted
        return
    floor, keep = sum(map(least, sizes)), oracle.kept_of(0.6, 12)
    if floor > keep:
        with pytest.raises(LapValueError, match=rf"keeps {floor} units at least.*keeps {keep} of"):
            prune(topology, "channel", 0.6, **how)
        return
    result = prune(topology, "channel", 0.6, **how)
    assert gone(topology, "channel", result) == oracle.together(own, 0.6)


def sizes_of(topology: lap_ext.Topology, result: lap_ext.PruneResult) -> dict[str, int]:
    """How many output channels of each layer keep a weight, by the masks of convolutions."""
    return {
        layer.name: int(result.masks[layer.name].flatten(1).any(1).count_nonzero())
        for layer in topology.layers.values()
        if layer.name in result.masks
    }


@pytest.mark.parametrize(("multiple_of", "sparsity", "kept"), [
    (1, 0.4, (10, 5)), (8, 0.4, (8, 8)), (4, 0.4, (8, 4)), (8, 0.1, (8, 8)), (8, 0.9, (8, 8)),
    (3, 0.3, (9, 6)), (8, 0.0, (16, 8)), (5, 0.45, (5, 5)), (32, 0.5, (16, 8)),
])  # fmt: skip
def test_multiples(multiple_of: int, sparsity: float, kept: tuple[int, int]) -> None:
    topology = traced_mlp(4, 16, 8, 3)
    result = prune(topology, "channel", sparsity, multiple_of=multiple_of)
    assert tuple(x.kept for x in result.families) == kept


@pytest.mark.parametrize(("sparsity", "kept"), [(0.2, 8), (0.7, 8), (0.0, 16)])
def test_multiples_of_a_grouped_convolution_count_all_channels(sparsity: float, kept: int) -> None:
    topology = bound("grouped")
    result = prune(topology, "channel", sparsity, multiple_of=8)
    assert sizes_of(topology, result)["0"] == kept


@pytest.mark.parametrize("kind", ["channel", "unit"])
def test_multiples_of_packed_experts_are_those_of_an_expert(kind: str) -> None:
    topology = topologies.traced("hf_mixtral_batched_mm")  # 3 experts of 12 inner channels
    result = prune(topology, kind, 0.4, multiple_of=8)
    for layer in (0, 1):
        mask = result.masks[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        rows = mask.any(2)  # [expert, gate and up]
        assert rows.sum(1).tolist() == [16, 16, 16]
        assert torch.equal(rows[:, :12], rows[:, 12:])
    result = prune(topology, kind, 0.4, multiple_of=3)
    mask = result.masks["model.layers.0.mlp.experts.down_proj"]
    assert mask.any(1).sum(1).tolist() == [6, 6, 6]
    result = prune(topology, kind, 0.6, multiple_of=2)
    assert result.masks["model.layers.0.mlp.experts.down_proj"].any(1).sum(1).tolist() == [4, 4, 4]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_uniform_layers_lose_the_same_number(scope: Any) -> None:
    topology = traced_blocks()
    groups = topology.groups("channel")
    inner = [x for x in groups.families if x.layers[0].endswith("up")]
    assert len(inner) == 3
    worth = worths(topology, "channel")
    for how in ({}, {"multiple_of": 4}):
        result = prune(topology, "channel", 0.5, scope=scope, normalize="none", uniform=True, **how)
        kept = [x.kept for x in result.families if x.layers[0].endswith("up")]
        assert len(set(kept)) == 1
        if how:
            assert kept[0] % 4 == 0
        removed = gone(topology, "channel", result)
        for family in inner:  # in each, the ones of least worth
            own = sorted(family.groups.tolist(), key=lambda g: (worth[g], -g))
            assert removed & set(own) == set(own[: len(own) - kept[0]])
    if scope == "global":
        free = prune(topology, "channel", 0.5, scope=scope, normalize="none")
        assert len({x.kept for x in free.families if x.layers[0].endswith("up")}) == 3


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.up.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def traced_blocks() -> lap_ext.Topology:
    """Three blocks of different size of weights."""
    model = nn.Sequential(nn.Linear(3, 4), *(Block(x) for x in (1, 3, 2)), nn.Linear(4, 2))
    return lap_ext.trace(model, torch.randn(2, 3))


def test_uniform_pools_are_ranked_together() -> None:
    topology = traced_blocks()
    groups, worth = topology.groups("channel"), worths(topology, "channel")
    inner = [x for x in groups.families if x.layers[0].endswith("up")]
    others = [x for x in groups.families if x not in inner]
    own = [oracle.pool_of(x, worth) for x in ([x] for x in others)] + [oracle.pool_of(inner, worth)]
    result = prune(topology, "channel", 0.5, scope="global", normalize="none", uniform=True)
    assert gone(topology, "channel", result) == oracle.together(own, 0.5)


def split() -> lap_ext.Topology:
    """A layer of which one half is read once more: units of one family that cost differently."""

    def rule(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.first(x))
        return m.out(y) + m.more(y[:, :5])

    layers = {"first": nn.Linear(4, 10), "out": nn.Linear(10, 3), "more": nn.Linear(5, 3)}
    return lap_ext.trace(Net(rule, **layers), torch.randn(2, 4))


def flops_of(topology: lap_ext.Topology, kind: str) -> list[float]:
    """What each group alone saves of linear layers: 2 * positions of each of its weights."""
    layers = {x.parameter: Tensor() for x in topology.layers.values()}
    return [
        2.0 * 2 * len(unit_oracle.scored(x, topology.model, layers)) for x in topology.groups(kind)
    ]


@pytest.mark.parametrize(
    ("scope", "normalize"), [("layer", "none"), ("global", "none"), ("global", "lamp")]
)
@pytest.mark.parametrize("cost", ["weights", "flops"])
@pytest.mark.parametrize("net", ["split", "mlp"])
def test_costs(net: str, cost: Any, scope: Any, normalize: str) -> None:
    topology = split() if net == "split" else traced_mlp(2, 12, 10, 60)
    each = flops_of(topology, "channel")
    each = [x / 4 for x in each] if cost == "weights" else each
    own = [oracle.normalized(x, normalize) for x in pools(topology, "channel", cost=each)]
    how = {"scope": scope, "normalize": normalize, "cost": cost}
    power = 1 if normalize == "lamp" else 2  # its values are squares

    def density(unit: oracle.Unit) -> float:
        return unit.worth**power / unit.cost

    for sparsity in (0.2, 0.55, 0.9):
        wanted = set()
        for part in [own] if scope == "global" else [[x] for x in own]:
            total = sum(Fraction(u.cost) for pool in part for u in pool.units)

            def enough(removed: set[int], total: Fraction = total, s: float = sparsity) -> bool:
                return (
                    total - sum(Fraction(each[g]) for g in removed)
                    <= (1 - Fraction(repr(s))) * total
                )

            wanted |= oracle.until(oracle.order(part, density), enough)
        assert gone(topology, "channel", prune(topology, "channel", sparsity, **how)) == wanted


@pytest.mark.parametrize("counted", ["params", "flops"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("widths", [(5, 9, 7, 3), (4, 6, 12, 6, 2)])
def test_targets(widths: tuple[int, ...], scope: Any, counted: str) -> None:
    topology = traced_mlp(*widths)
    own = pools(topology, "channel")

    def count(removed: set[int]) -> int:
        """The size of an MLP that is built thinner."""
        left, first = list(widths), 0
        for index, width in enumerate(widths[1:-1], 1):
            left[index] = width - sum(first <= g < first + width for g in removed)
            first += width
        thin = mlp(*left)
        if counted == "params":
            return sum(x.numel() for x in thin.parameters())
        return sum(2 * x.numel() for x in thin.parameters() if x.dim() > 1)

    place = {u.groups: (i + 0.5) / len(p.units) for p in own for i, u in enumerate(p.units)}
    keys = {"layer": lambda u: place[u.groups], "global": lambda u: u.worth}
    going = oracle.order(own, keys[scope])
    dense = count(set())
    for target in (0.3, 0.62, 0.9, dense // 2, dense - 1, dense):
        limit = math.floor(Fraction(repr(target)) * dense) if isinstance(target, float) else target
        made = getattr(allocation, counted)(target)
        result = prune(topology, "channel", made, scope=scope, normalize="none")
        removed = gone(topology, "channel", result)
        assert removed == oracle.until(going, lambda x, limit=limit: count(x) <= limit)
        assert count(removed) <= limit


@pytest.mark.parametrize("counted", ["params", "flops"])
def test_a_target_below_the_floor_says_what_is_left(counted: str) -> None:
    topology = traced_mlp(4, 8, 8, 2)
    least = {"params": 4 + 1 + 1 + 1 + 2 + 2, "flops": 2 * (4 + 1 + 2)}[counted]
    make = getattr(allocation, counted)
    prune(topology, "channel", make(least))
    with pytest.raises(LapValueError, match=f"at least {least} "):
        prune(topology, "channel", make(least - 1))
    floor = {"params": 4 * 3 + 3 + 9 + 3 + 6 + 2, "flops": 2 * (12 + 9 + 6)}[counted]
    with pytest.raises(LapValueError, match=f"at least {floor} "):
        prune(topology, "channel", make(floor - 1), min_keep=3)


@pytest.mark.parametrize("counted", ["params", "flops"])
def test_a_target_holds_with_multiples(counted: str) -> None:
    """Rounding never leaves more than the target, or it is an error."""
    topology = traced_mlp(4, 16, 16, 2)
    make = getattr(allocation, counted)

    def count(result: lap_ext.PruneResult) -> int:
        a, b = (x.kept for x in result.families)
        weights, biases = 4 * a + a * b + b * 2, a + b + 2
        return weights + biases if counted == "params" else 2 * weights

    dense = count(prune(topology, "channel", 0.0))
    for target in range(dense // 8, dense, dense // 8):
        try:
            result = prune(topology, "channel", make(target), multiple_of=8)
        except LapValueError:
            assert target < count(prune(topology, "channel", 1.0, multiple_of=8))
        else:
            assert count(result) <= target
            assert all(x.kept % 8 == 0 for x in result.families)


def test_parameters_of_experts_are_counted() -> None:
    topology = bound("experts")
    each = 6 + 2 * 5 * 6 + 5 + 6  # the router's row and both layers
    dense = sum(x.numel() for x in topology.model.parameters())
    for target, kept in ((dense, 4), (dense - 1, 3), (dense - each, 3), (dense - each - 1, 2)):
        result = prune(topology, "expert", allocation.params(target))
        assert [x.kept for x in result.families] == [kept]
    with pytest.raises(LapValueError, match="params"):
        prune(topology, "expert", allocation.flops(0.5))


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["residual", "grouped", "recurrent"])
def test_rounds_are_prunings_one_after_the_other(name: str, scope: Any, rounds: int) -> None:
    topology = bound(name)
    how = {"scope": scope, "normalize": "norm" if scope == "global" else "none"}
    result = prune(topology, "channel", 0.6, rounds=rounds, **how)
    steps = bound(name)
    steps.model.load_state_dict(topology.model.state_dict())
    for number in range(1, rounds + 1):
        share = Fraction(0.6) * Fraction(number, rounds)
        last = lap_ext.prune(steps.model, None, share, topology=steps, structure="channel", **how)
    assert gone(topology, "channel", result) == gone(topology, "channel", last)
    assert [x.kept for x in result.families] == [x.kept for x in last.families]


def test_rounds_score_anew() -> None:
    """Some model must show that a round is not for nothing."""
    topology = bound("residual")
    results = [prune(topology, "channel", 0.6, rounds=n) for n in (1, 3)]
    assert gone(topology, "channel", results[0]) != gone(topology, "channel", results[1])


def test_a_target_in_rounds() -> None:
    topology = traced_mlp(5, 9, 7, 3)
    dense = sum(x.numel() for x in topology.model.parameters())
    result = prune(topology, "channel", allocation.params(0.4), rounds=3, scope="global")
    a, b = (x.kept for x in result.families)
    assert 5 * a + a + a * b + b + b * 3 + 3 <= math.floor(0.4 * dense)


def test_heads_go_as_whole_groups_of_queries() -> None:
    topology = bound("gqa")
    result = prune(topology, "head", 0.3)
    assert [x.kept for x in result.families] == [2]
    heads = {
        "q": result.masks["q"].view(3, 4, 8),
        "k": result.masks["k"].view(3, 2, 8),
        "v": result.masks["v"].view(3, 2, 8),
        "o": result.masks["o"].T.reshape(3, 4, 7),
    }
    kept = {name: mask.flatten(1) for name, mask in heads.items()}
    for mask in kept.values():
        assert torch.equal(mask.all(1), mask.any(1))
    assert len({tuple(mask.all(1).tolist()) for mask in kept.values()}) == 1
    assert kept["q"].all(1).sum() == 2


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_grouped_convolutions_stay_balanced(sparsity: float, scope: Any) -> None:
    topology = bound("grouped")
    masks = prune(topology, "channel", sparsity, scope=scope).masks
    rows = masks["2"].flatten(1).any(1).view(4, 2).sum(1)
    cols = masks["0"].flatten(1).any(1).view(4, 4).sum(1)
    assert len(set(rows.tolist())) == len(set(cols.tolist())) == 1
    back = masks["5"].flatten(2)  # [8 inputs in 2 groups, 6 outputs of a group]
    assert len({int(x.any(2).any(0).sum()) for x in back.split(4)}) == 1


def test_a_channel_of_keys_goes_from_every_head() -> None:
    """The view of heads needs equal parts: a channel goes from each."""
    topology = bound("gqa")
    masks = prune(topology, "channel", 0.5).masks
    for name, heads in (("q", 6), ("k", 3), ("v", 3)):
        assert masks[name].any(1).view(heads, 2).sum(1).tolist() == [1] * heads


@pytest.mark.parametrize(("sparsity", "match"), [
    (1.5, "<= 1"), (-0.1, "0 <="), (math.nan, "nan"),
])  # fmt: skip
def test_sparsities_out_of_range(sparsity: float, match: str) -> None:
    with pytest.raises(LapValueError, match=match):
        prune(bound("mlp"), "channel", sparsity)


def test_sparsities_of_the_wrong_kind() -> None:
    topology = bound("mlp")
    for wrong in (lap_ext.erk(0.5), None, "0.5"):
        with pytest.raises(LapTypeError):
            prune(topology, "channel", wrong)
    for how in ({"scope": "global"}, {"uniform": True}):
        with pytest.raises(LapTypeError, match="one number"):
            prune(topology, "channel", {"0": 0.5}, **how)
    for structure in (None, "row", "2:4"):
        with pytest.raises((LapTypeError, LapValueError)):
            lap_ext.prune(
                *(topology.model, None, allocation.params(0.5)), topology=topology,
                structure=structure,
            )  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("hf_mixtral_batched_mm", "channel")])
def test_the_same_masks_in_chunks(name: str, kind: str) -> None:
    topology = topologies.traced(name) if name.startswith("hf") else bound(name, zeros=0.1)
    for how in ({}, {"scope": "global", "rounds": 2}):
        options = {"structure": kind, **how}
        given = {"layer": 0.5, "global": allocation.params(0.8)}[how.get("scope", "layer")]
        cut = masks_of(Cut(topology, every_row), given, **options)
        result = prune(topology, kind, given, **how)
        assert cut.keys() <= result.masks.keys()
        for layer, mask in cut.items():
            assert torch.equal(mask, result.masks[layer])
