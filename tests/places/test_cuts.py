# SPDX-License-Identifier: MIT
"""Wherever a layer is cut, whatever is held and whatever a sample says: the bits of one chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lap_ext
from lap_ext.criteria import Criterion, Lookahead, Wanda
from lap_ext.criteria.context import Network
from lap_ext.criteria.statistics.measured import Statistics
from lap_ext.ops import schema
from lap_ext.places import Memory
from lap_ext.progress import Step
from lap_ext.pruning import thresholds
from lap_ext.pruning.scoring import How, Scorer
from tests.helpers.cut_place import Cut, Cuts, masks_of
from tests.helpers.place_nets import CASES, model_of, topology_of

NETS = sorted(CASES)
HOWS: list[dict[str, Any]] = [
    {},
    {"criterion": "magnitude"},
    {"order": "backward"},
    {"order": "forward", "rounds": 2},
    {"scope": "global", "normalize": "none"},
    {"scope": "global", "normalize": "none", "min_keep": 0.05},
    {"scope": "global", "normalize": "lamp"},
    {"scope": "global", "normalize": "norm", "rounds": 2},
]
row_sets = st.sets(st.integers(0, 25), max_size=12)


@st.composite
def cuts(draw: st.DrawFn) -> Cuts:
    """Cuts layers of the same number of rows alike."""
    found = draw(row_sets)
    return lambda layer: found


@st.composite
def rooms(draw: st.DrawFn) -> dict[str, Any]:
    """Draws how a place reads: slices, pieces, how many keys it holds, and which rows it samples.

    A sample of the same few rows again and again is a lie that a ranking believes at first.
    """
    lies = draw(st.none() | st.lists(st.integers(0, 20), min_size=1, max_size=3))
    return {
        "slices": draw(cuts()),
        "pieces": draw(st.sampled_from([1, 7, 1 << 30])),
        "capacity": draw(st.sampled_from([0, 1, 5, 1000])),
        "sampled": None if lies is None else lambda layer: lies,
    }


def drawn(data: st.DataObject, kinds: list[str]) -> lap_ext.Topology:
    """Draws a model; with few levels, most scores are equal."""
    name, kind = data.draw(st.sampled_from(NETS)), data.draw(st.sampled_from(kinds))
    seed, levels = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([0, 1, 3]))
    return topology_of(name, model_of(name, kind, seed=seed, levels=levels))


@settings(max_examples=25)
@pytest.mark.filterwarnings("ignore:.*scores are 0:UserWarning")
@pytest.mark.filterwarnings("ignore:.*no weight:UserWarning")
@given(st.data(), cuts(), rooms(), st.sampled_from(HOWS), st.sampled_from([0.1, 0.5, 0.9]))
def test_masks(
    data: st.DataObject, cuts: Cuts, room: dict[str, Any], how: dict[str, Any], sparsity: float
) -> None:
    topology, how = drawn(data, ["float32", "float64"]), {"layers": "*", "min_keep": 0} | how
    want = lap_ext.prune(
        topology.model, None, sparsity, topology=topology, apply=False, **how
    ).masks
    got = masks_of(Cut(topology, cuts, **room), sparsity, **how)
    assert list(got) == list(want)
    for name, mask in want.items():
        assert torch.equal(got[name], mask), name


@given(st.data(), cuts(), st.booleans(), st.sampled_from(["edge", "fold", "ignore"]))
def test_norms(data: st.DataObject, cuts: Cuts, masked: bool, batch_norm: str) -> None:
    """Squared norms of inputs and outputs, with and without masks."""
    topology = drawn(data, ["float32", "bfloat16", "mixed64"])
    masks = {name: torch.rand(x.shape) < 0.7 for name, x in topology.layers.items() if masked}
    found = []
    for place in (Memory(topology, masks), Cut(topology, cuts, masks=masks)):
        network = Network(place, batch_norm)
        network.measure(Step(None, "measure", 0))
        norms = [network.norms(role) for role in topology.roles]
        found.append([*network.squared_norms().values(), *(x for pair in norms for x in pair)])
    assert len(found[0]) == len(found[1]) == 4 * len(topology.roles)
    assert all(map(torch.equal, *found))


@given(st.data(), cuts(), st.sampled_from(["plain", "scaled", "wide"]))
def test_scores(data: st.DataObject, cuts: Cuts, how: How) -> None:
    topology = drawn(data, ["float32", "float16", "mixed64"])
    statistics = Statistics(
        {
            f"{name}.mean_square" + (f".{number}" if number else ""): torch.rand(
                role.part.channels[0], dtype=torch.float64
            )
            for name, layer in topology.layers.items()
            for number, role in enumerate(layer.roles)
        }
    )
    memory, cut = Network(Memory(topology)), Network(Cut(topology, cuts))
    memory.statistics = cut.statistics = statistics
    for criterion in (Criterion(), Lookahead(), Wanda()):
        for layer in topology.layers.values():
            (whole,) = memory.place.chunks(layer)
            want = Scorer(memory, criterion, layer, how).of(whole).flatten()
            scorer = Scorer(cut, criterion, layer, how)
            got = [scorer.of(chunk).flatten() for chunk in cut.place.chunks(layer)]
            assert torch.equal(torch.cat([*got, want[:0]]), want)


def test_neighbors_that_are_named() -> None:
    """Full layers that are read for a product are held together."""
    model, inputs = model_of("mlp"), CASES["mlp"].inputs
    topology = lap_ext.trace(model, inputs, neighbors={"3": (["0", "0"], ["5", "5"])})
    networks = [Network(Memory(topology)), Network(Cut(topology, fits=True))]
    for role in topology.roles:
        one, other = (network.norms(role) for network in networks)
        assert all(map(torch.equal, one, other))


# --- thresholds -----------------------------------------------------------------------------------

scores = st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.0000001, 2.0, 3.5, 1e30, float("inf")])
slices_of_scores = st.lists(st.lists(scores, min_size=3, max_size=40), min_size=2, max_size=4)


def threshold_masks(
    slices: list[Tensor],
    lives: list[Tensor],
    keep: int,
    interval: tuple[int, int],
    capacity: int,
    step: int = 7,
) -> list[Tensor]:
    """Makes masks by a threshold of scores that come some at a time."""

    def read() -> Iterator[tuple[int, Tensor, Tensor | None]]:
        for index, (x, live) in enumerate(zip(slices, lives, strict=True)):
            for part, which in zip(x.split(step), live.split(step), strict=True):
                yield index, part, None if which.all() else which

    found = thresholds.threshold(
        read, len(slices), keep, interval, slices[0].dtype, capacity, torch.clone
    )
    masks = []
    for x, live, ties in zip(slices, lives, found.ties, strict=True):
        left = ties
        parts = [torch.empty(0, dtype=torch.bool)]
        for part, which in zip(x.split(step), live.split(step), strict=True):
            if part.numel():
                mask, taken = schema.call(schema.threshold_mask, part, which, found.key, left)
                parts.append(mask)
                left -= int(taken)
        masks.append(torch.cat(parts))
    assert [int(mask.sum()) for mask in masks] == list(found.kept)
    return masks


@settings(max_examples=40)
@given(
    slices_of_scores,
    st.integers(0, 170),
    st.tuples(scores, scores),
    st.sampled_from([0, 1, 5, 1000]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_thresholds(
    values: list[list[float]],
    keep: int,
    ends: tuple[float, float],
    capacity: int,
    dtype: torch.dtype,
    share: float,
) -> None:
    """Those of topk_mask, whatever the interval at the start, and whatever is held."""
    slices = [torch.tensor(x, dtype=dtype) for x in values]
    lives = [torch.rand(x.shape) < share for x in slices]
    keep %= sum(map(len, values)) + 2
    low, high = sorted(thresholds.key_of(x, dtype) for x in ends)
    want = lap_ext.topk_mask(slices, keep=keep, mask=lives)
    got = threshold_masks(slices, lives, keep, (low, high), capacity)
    assert all(map(torch.equal, got, want)) and len(got) == len(want)


@pytest.mark.parametrize("lie", ["low", "high", "one key", "none"])
@pytest.mark.parametrize("capacity", [0, 100, 10**6])
@pytest.mark.parametrize("keep", [1, 999, 30_000, 59_999])
def test_samples_that_mislead(keep: int, capacity: int, lie: str) -> None:
    slices = [torch.rand(20_000).square(), torch.rand(30_000).round(decimals=2), torch.rand(10_000)]
    ordered = torch.cat(slices).sort().values
    sample = {"low": ordered[:500], "high": ordered[-500:], "one key": ordered[:1].expand(500)}
    interval = thresholds.bracket(sample.get(lie, ordered[:0]).clone(), keep, 60_000)
    assert interval[0] <= interval[1]
    lives = [torch.ones_like(x, dtype=torch.bool) for x in slices]
    want = lap_ext.topk_mask(slices, keep=keep)
    got = threshold_masks(slices, lives, keep, interval, capacity, 997)
    assert all(map(torch.equal, got, want))
