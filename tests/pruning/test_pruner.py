# SPDX-License-Identifier: MIT
"""Pruner: what it prunes and when, that pruned weights stay away, the model stays the user's.

The oracle of a run is the same loop written out with prune and Masks.keep.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lap_ext
from lap_ext.pruning.pruner import Pruner
from lap_ext.schedule import cubic, exponential, iterative, linear, one_shot
from tests.helpers import masked_network as cases
from tests.helpers.pruner_training import EXAMPLE, train, two_layers

SIZES = {"conv": 36, "fc1": 512, "fc2": 24}


def test_by_hand() -> None:
    """The k-th call prunes to schedule(k); what it returns and what it shows."""
    net = two_layers()
    given = {1: 0.5, 3: {"0": 0.75}}
    pruner = Pruner(net, torch.ones(1, 2), given.get, criterion="magnitude")
    assert pruner.step() is None and pruner.result is None
    assert len(pruner.masks) == 0 and pruner.sparsity == 0.0
    result = pruner.step()
    assert result is pruner.result and [row.kept for row in result.layers] == [2, 1]
    assert net[0].weight.tolist() == [[0, 0], [3, -4]] and net[2].weight.tolist() == [[0, -6]]
    assert pruner.sparsity == result.sparsity == 0.5
    assert pruner.step() is None and pruner.result is result
    pruner.step()
    assert net[0].weight.tolist() == [[0, 0], [0, -4]] and net[2].weight.tolist() == [[0, -6]]
    assert pruner.masks == pruner.result.masks != result.masks
    assert [row.kept for row in pruner.result.layers] == [1, 1]
    assert (
        repr(pruner)
        == "Pruner(after 4 steps, Masks(2 layers, 2 of 6 weights kept, sparsity 0.6667))"
    )


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [  # of 512 weights, after each of 6 calls
        (one_shot(0.5, at=2), [512, 512, 256, 256, 256, 256]),
        (linear(0.5, start=1, end=5, every=2), [512, 512, 512, 384, 384, 256]),
        (cubic(0.5, start=1, end=5, every=2), [512, 512, 512, 288, 288, 256]),  # 512 * (1/2 + 1/16)
        (exponential(0.75, start=1, end=5, every=2), [512, 512, 512, 256, 256, 128]),
        (iterative(0.5, rounds=3, every=2, start=1), [512, 256, 256, 128, 128, 64]),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("optimizer", [False, True], ids=["alone", "with optimizer"])
def test_schedules(schedule: Any, kept: list[int], optimizer: bool) -> None:
    model = cases.net()
    trains = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, EXAMPLE, schedule, optimizer=trains if optimizer else None)
    found = []
    for batch in cases.batches(6):
        cases.train(model, trains, [batch])
        pruner.step()
        found.append(int(model.fc1.weight.count_nonzero()))
    assert found == kept


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_equals_the_loop_written_out(name: str, scope: str) -> None:
    model, data = cases.net(), cases.batches(12)
    schedule = cubic(0.9, start=1, end=9, every=2)
    options = {"scope": scope, "normalize": "norm", "exclude": "fc2"}
    other = copy.deepcopy(model)
    optimizer = cases.OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, EXAMPLE, schedule, optimizer=optimizer, **options)
    plain = cases.OPTIMIZERS[name](other.parameters())
    topology = lap_ext.trace(other, EXAMPLE)
    masks, handle = None, None
    for step, batch in enumerate(data):
        cases.train(model, optimizer, [batch])
        pruner.step()
        cases.train(other, plain, [batch])
        if schedule(step) is not None:
            given = {"masks": masks, "topology": topology, **options}
            masks = lap_ext.prune(other, None, schedule(step), **given).masks
            if handle:
                handle.remove()
            handle = masks.keep(other, plain)
        assert pruner.masks == (masks or lap_ext.Masks({}))
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert set(pruner.masks) == {"conv", "fc1"}


# --- pruned weights never return ------------------------------------------------------------------

sparsities = st.one_of(
    st.none(),
    st.floats(0, 1),
    st.dictionaries(st.sampled_from(["conv", "fc1", "fc2"]), st.floats(0, 1), min_size=1),
    st.builds(lap_ext.erk, st.floats(0, 1)),
)


@pytest.mark.filterwarnings("ignore:All scores are 0")  # behind a layer that keeps nothing
@given(
    asked=st.lists(sparsities, min_size=1, max_size=6),
    order=st.sampled_from(["parallel", "forward", "backward"]),
    rounds=st.integers(1, 3),
    name=st.sampled_from([None, "momentum", "adamw"]),
    criterion=st.sampled_from(["lookahead", "wanda"]),
)
def test_any_sequence_of_sparsities(
    asked: list[Any], order: str, rounds: int, name: str | None, criterion: str
) -> None:
    """Up and down: masks only shrink, each to the exact count, and the weights follow them."""
    model = cases.net()
    optimizer = cases.OPTIMIZERS[name or "adamw"](model.parameters())
    schedule = dict(enumerate(asked)).get
    options = {"order": order, "rounds": rounds, "criterion": criterion, "min_keep": 0}
    options["data"] = cases.batches(1) if criterion == "wanda" else None
    options["optimizer"] = optimizer if name else None
    pruner = Pruner(model, EXAMPLE, schedule, **options)
    left = dict(SIZES)
    for sparsity in asked:
        before = pruner.masks
        train(model, optimizer, 1, pruner)
        if sparsity is None:
            assert pruner.masks is before
            continue
        shapes = {n: layer.shape for n, layer in pruner.topology.layers.items()}
        for layer, keep in lap_ext.allocation.of(sparsity).keeps(shapes).items():
            left[layer] = min(left[layer], keep)
        assert {n: kept for n, (kept, _) in pruner.masks.counts().items()} == left
        for layer, mask in before.items():
            assert not (pruner.masks[layer] & ~mask).any(), "a pruned weight has returned"


@given(asked=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_one_ranking_over_all_layers(asked: list[float]) -> None:
    """Global scope: exactly as many as the sparsity says of all weights together, each time."""
    model = cases.net()
    pruner = Pruner(model, EXAMPLE, dict(enumerate(asked)).get, scope="global", min_keep=0)
    left = sum(SIZES.values())
    for sparsity in asked:
        before = pruner.masks
        pruner.step()
        total = int((1 - Fraction(sparsity)) * 572 + Fraction(1, 2))
        left = min(left, total)
        assert pruner.masks.kept == left
        for layer, mask in before.items():
            assert not (pruner.masks[layer] & ~mask).any()


class Some:
    """Half of the layers that it names; no word of the others."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def keeps(self, shapes: Any) -> dict[str, int]:
        del shapes
        return {name: SIZES[name] // 2 for name in self.names}


def test_allocations_of_other_layers_each_time() -> None:
    """Layers that a pruning does not name keep the masks that they have."""
    model = cases.net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = [Some("fc1"), Some("conv"), Some("fc2", "fc1")].__getitem__
    pruner = Pruner(model, EXAMPLE, schedule, optimizer=optimizer)
    train(model, optimizer, 1, pruner)
    first = pruner.masks["fc1"]
    assert list(pruner.masks) == ["fc1"]
    train(model, optimizer, 2, pruner)
    assert list(pruner.masks) == ["conv", "fc1", "fc2"], "in the network's order"
    assert torch.equal(pruner.masks["fc1"], first)
    assert [row.kept for row in pruner.result.layers] == [18, 256, 12]


def test_the_papers_schedules() -> None:
    """Ratios for each layer: what is left falls by them each time; or once, from the dense net."""
    ratios = {"conv": 0.5, "fc*": 0.25}
    left = {k: {"conv": 36 * 0.5**k, "fc1": 512 * 0.75**k, "fc2": 24 * 0.75**k} for k in (1, 2)}

    def gradually(step: int) -> Any:
        return (
            lap_ext.allocation.compounded(ratios, 1 + step // 3)
            if step % 3 == 0 and step < 6
            else None
        )

    def at_once(step: int) -> Any:
        return lap_ext.allocation.compounded(ratios, 2) if step == 3 else None

    found = []
    for schedule in (gradually, at_once):
        torch.manual_seed(0)
        model = cases.net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        pruner = Pruner(model, EXAMPLE, schedule, optimizer=optimizer)
        train(model, optimizer, 3, pruner)
        kept = {name: n for name, (n, _) in pruner.masks.counts().items()}
        assert kept == (left[1] if schedule is gradually else {})
        train(model, optimizer, 3, pruner)
        found.append({name: n for name, (n, _) in pruner.masks.counts().items()})
    # 36 / 4; 512 * 9 / 16; floor(13.5 + 1/2)
    assert found[0] == found[1] == {"conv": 9, "fc1": 288, "fc2": 14}


def test_without_an_optimizer_step_sets_them_back() -> None:
    model = cases.net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, EXAMPLE, one_shot(0.8))
    pruner.step()
    for batch in cases.batches(4):
        cases.train(model, optimizer, [batch])
        assert model.fc1.weight[~pruner.masks["fc1"]].any(), "the optimizer moves them"
        with torch.no_grad():
            model.conv.weight[~pruner.masks["conv"]] = float("nan")
        assert pruner.step() is None
        cases.check_zero(model, pruner.masks)


@pytest.mark.parametrize("name", ["momentum", "adamw", "adam-amsgrad", "rmsprop"])
def test_moments_of_pruned_weights_are_zero(name: str) -> None:
    """Also of those that were built up while the weight was dense."""
    model = cases.net()
    optimizer = cases.OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, EXAMPLE, iterative(0.5, rounds=3, every=2, start=1), optimizer=optimizer)
    for _ in range(8):
        train(model, optimizer, 1, pruner)
        for layer, mask in pruner.masks.items():
            state = optimizer.state[model.get_parameter(f"{layer}.weight")]
            moments = [v for v in state.values() if isinstance(v, Tensor) and v.dim()]
            assert moments and all(not m[~mask].any() and m[mask].any() for m in moments)


def test_several_optimizers_and_layers_that_none_trains() -> None:
    model = cases.net()
    model.conv.weight.requires_grad_(False)
    first = torch.optim.SGD(model.fc1.parameters(), 0.1, momentum=0.9)
    second = torch.optim.AdamW(model.fc2.parameters(), 0.01)
    pruner = Pruner(model, EXAMPLE, cubic(0.8, start=0, end=4), optimizer=(first, second))
    for batch in cases.batches(8):
        cases.train(model, first, [batch])
        second.step()
        pruner.step()
        cases.check_zero(model, pruner.masks)
    assert not first.state[model.fc1.weight]["momentum_buffer"][~pruner.masks["fc1"]].any()
    pruner.remove()
    assert not first._optimizer_step_pre_hooks and not second._optimizer_step_pre_hooks
