# SPDX-License-Identifier: MIT
"""Masks of units across layers: what they make zero, and that it stays zero."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.errors import LapValueError
from tests.helpers import unit_oracle
from tests.helpers.unit_nets import KINDS, NETS, Experts, bound, made, traced

CASES = [(name, kind) for name in NETS for kind in KINDS.get(name, ("channel",))]
INPUTS = {name: make for name, (_, make) in NETS.items()}


def prune(topology: lap_ext.Topology, sparsity: Any, kind: str = "channel", **how: Any) -> Any:
    """Prunes the model of a topology."""
    return lap_ext.prune(topology.model, None, sparsity, topology=topology, structure=kind, **how)


def convolutions() -> tuple[nn.Module, Tensor, dict[str, str]]:
    """A network of convolutions, and for each norm's ReLU the convolution that makes its input."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 10, 1), nn.GroupNorm(10, 10), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3)),
    )
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.rand_like(x) + 0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
    return model.eval(), torch.randn(4, 3, 6, 6), {"2": "0", "5": "3", "8": "6", "12": "11"}


@pytest.mark.parametrize("training", [False, True])
def test_a_masked_channel_is_exactly_zero_after_its_norm(training: bool) -> None:
    model, x, producers = convolutions()
    result = lap_ext.prune(model, x, 0.5, structure="channel")
    model.train(training)
    seen: dict[str, Tensor] = {}
    for name in producers:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, y, name=name: seen.__setitem__(name, y)
        )
    model(x)
    for name, layer in producers.items():
        gone = ~result.masks[layer].flatten(1).any(1)
        values = seen[name].transpose(0, 1).flatten(1)
        assert gone.sum() == gone.numel() // 2
        assert int(values[gone].count_nonzero()) == 0
        assert bool(values[~gone].any(1).all())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_masks_cover_every_parameter_of_the_units(name: str, kind: str) -> None:
    topology = bound(name)
    groups = topology.groups(kind)
    result = prune(topology, 0.5, kind)
    parameters = dict(topology.model.named_parameters())
    masked = {x for x, value in parameters.items() if bool((value == 0).any())}
    members = {m.parameter for group in groups for m in group.members}
    if kind == "expert":  # those that go have parameters of their own
        members = {m.parameter for g in groups for m in g.members if m.parameter in masked}
        assert len(masked) == 1 + 2 * 4  # the router; weights and biases of two layers
    assert masked == members  # all values were other than zero before
    assert {x for x in masked if parameters[x].dim() == 1}
    assert not result.masks.check(topology.model)


def test_apply_false_changes_nothing_and_apply_does_it_later() -> None:
    topology = bound("residual")
    before = copy.deepcopy(topology.model.state_dict())
    result = prune(topology, 0.5, apply=False)
    for name, value in topology.model.state_dict().items():
        assert torch.equal(value, before[name])
    now = bound("residual")
    now.model.load_state_dict(before)
    prune(now, 0.5)
    result.apply(topology.model)
    for name, value in topology.model.state_dict().items():
        assert torch.equal(value, now.model.state_dict()[name])


def test_running_statistics_stay() -> None:
    topology = bound("residual")
    before = copy.deepcopy(dict(topology.model.named_buffers()))
    result = prune(topology, 0.5)
    for name, value in topology.model.named_buffers():
        assert torch.equal(value, before[name])
    assert not [x for x in result.masks if "running" in x]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_removed_units_stay_removed(name: str, kind: str) -> None:
    """Pruned again at a higher sparsity, with masks=, with zeros alone, and at a lower one."""
    topology = bound(name)
    first = prune(topology, 0.4, kind)
    gone = unit_oracle.covered(dict(first.masks))
    for masks in (first.masks, None):
        for sparsity in (0.7, 0.1):
            then = prune(topology, sparsity, kind, masks=masks, apply=False)
            now = unit_oracle.covered(dict(then.masks))
            assert now >= gone
            assert (now > gone) == (sparsity == 0.7) or name == "grouped"
            for a, b in zip(first.families, then.families, strict=True):
                assert b.kept <= a.kept
                if sparsity == 0.1:
                    assert b.kept == a.kept


def test_single_weights_then_channels() -> None:
    topology = bound("residual")
    single = lap_ext.prune(topology.model, None, 0.5, topology=topology)
    result = prune(topology, 0.5, masks=single.masks)
    for name, mask in single.masks.items():
        assert not bool((result.masks[name] & ~mask).any())
    kept = [(x.kept, x.total) for x in result.families]
    assert kept == [(4, 8), (3, 5)]
    assert not result.masks.check(topology.model)
    without = prune(topology, 0.5)  # zeros count as pruned
    assert unit_oracle.covered(dict(without.masks)) == unit_oracle.covered(dict(result.masks))


def test_channels_then_single_weights() -> None:
    topology = bound("residual")
    units = prune(topology, 0.5)
    layers = {x: mask for x, mask in units.masks.items() if x in topology.layers}
    result = lap_ext.prune(topology.model, None, 0.9, topology=topology, masks=units.masks)
    for name, mask in layers.items():
        assert not bool((result.masks[name] & ~mask).any())
    assert not units.masks.check(topology.model)


def test_masks_without_vectors_are_enough() -> None:
    """A file of an older version, or of another tool, has masks of weights alone."""
    topology = bound("residual")
    units = prune(topology, 0.5, apply=False)
    layers = {x: mask for x, mask in units.masks.items() if x in topology.layers}
    full = prune(topology, 0.7, masks=units.masks, apply=False)
    half = prune(topology, 0.7, masks=layers, apply=False)
    assert unit_oracle.covered(dict(full.masks)) == unit_oracle.covered(dict(half.masks))


def test_masks_of_the_wrong_shape_and_name() -> None:
    topology = bound("residual")
    wrong = {"norm": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(LapValueError, match="norm"):
        prune(topology, 0.5, masks=wrong)
    with pytest.raises(LapValueError, match="nothing"):
        prune(topology, 0.5, masks={"nothing": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize(("name", "kind"), [("residual", "channel"), ("packed", "head")])
def test_files_keep_the_structure_and_the_vectors(name: str, kind: str, tmp_path: Path) -> None:
    topology = bound(name)
    result = prune(topology, 0.5, kind, apply=False)
    result.masks.save(tmp_path / "masks")
    read = lap_ext.Masks.load(tmp_path / "masks", topology.model)
    assert read == result.masks
    assert read.structure == kind
    assert {x for x, mask in read.items() if mask.dim() == 1}
    read.apply(topology.model)
    assert not result.masks.check(topology.model)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_are_kept_through_training(optimizer: str) -> None:
    model, x, _ = convolutions()
    result = lap_ext.prune(model, x, 0.5, structure="channel")
    model.train()
    steps = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    }[optimizer](model.parameters())
    before = copy.deepcopy(model.state_dict())
    with result.masks.keep(model, steps):
        for _ in range(3):
            steps.zero_grad()
            model(x).square().sum().backward()
            steps.step()
    assert not result.masks.check(model)
    parameters = dict(model.named_parameters())
    for name in ("0.bias", "1.weight", "1.bias", "3.bias", "7.weight", "7.bias", "11.bias"):
        assert int(parameters[name].count_nonzero()) <= parameters[name].numel() // 2
        assert not torch.equal(parameters[name], before[name])
    x = torch.relu(model[:2](x))  # batch norms as trained
    gone = ~result.masks["0"].flatten(1).any(1)
    assert int(x[:, gone].count_nonzero()) == 0


def test_check_counts_revived_biases_and_norms() -> None:
    topology = bound("residual")
    result = prune(topology, 0.5)
    with torch.no_grad():
        topology.model.norm.weight.fill_(1.0)
        topology.model.first.bias.fill_(1.0)
    counts = result.masks.check(topology.model)
    assert sorted(counts.values()) == [4, 4]
    assert len(counts) == 2
    result.masks.apply(topology.model)
    assert not result.masks.check(topology.model)


def test_units_take_part_if_all_layers_that_make_them_are_chosen() -> None:
    topology = bound("residual")

    def families(**how: Any) -> list[str]:
        return [x.name for x in prune(topology, 0.5, apply=False, **how).families]

    both, inner = "first and 1 more", "inner"
    assert families() == [both, inner]
    assert families(exclude="last") == families(exclude="first") == [inner]
    assert families(exclude="out") == [both, inner]  # it reads them only
    assert families(layers="inner") == [inner]
    assert families(layers=["first", "last"]) == [both]
    assert families(layers=[nn.Conv2d]) == [both, inner]
    with pytest.raises(LapValueError, match="left out"):
        families(layers="first")
    with pytest.raises(LapValueError, match="nothing"):
        families(exclude="nothing")
    result = prune(topology, 0.5, exclude="last", apply=False)
    assert {(x.layer, x.channels) for x in result.fixed} >= {("first", 8), ("last", 8)}
    assert set(result.masks) & {"inner", "last"} == {"inner", "last"}  # last reads inner


def test_what_is_excluded_keeps_its_rows() -> None:
    topology = bound("residual")
    result = prune(topology, 0.5, exclude="inner")
    assert bool(topology.model.inner.weight.flatten(1).any(1).all())  # rows
    assert int(topology.model.inner.weight.any(0).flatten(1).any(1).sum()) == 4  # columns
    assert not [x for x in result.masks if x.startswith("inner.bias")]


def test_tables() -> None:
    topology = bound("residual")
    result = prune(topology, 0.5, apply=False)
    text = str(result)
    assert "channels of" in text
    assert [line.split() for line in text.splitlines() if line.startswith("inner ")][-1] == [
        *("inner", "3", "5", "40.00%")
    ]
    assert "Fixed: 4 channels of 'out' (an output of the model)." in text
    page = result._repr_html_()
    assert ">inner</td>" in page and "channels of" in page
    data = json.loads(result.to_json())
    assert data["structure"] == "channel"
    assert data["families"][1] == {"name": "inner", "layers": ["inner"], "kept": 3, "total": 5}
    assert data["fixed"] == [{"layer": "out", "channels": 4, "reason": "an output of the model"}]
    for row in result.layers:
        mask = result.masks[row.name]
        assert (row.kept, row.total) == (int(mask.sum()), mask.numel())
        assert row.nonzero == row.kept
    assert result.families[1].sparsity == pytest.approx(0.4)


def test_experts_in_a_list_are_removed_with_their_row_of_the_router() -> None:
    topology = bound("experts")
    result = prune(topology, 0.5, "expert")
    rows = result.masks["router"].any(1)
    assert rows.sum() == 2
    model = topology.model
    assert isinstance(model, Experts)
    for index, expert in enumerate(model.experts):
        values = torch.cat([x.flatten() for x in expert.parameters()])
        assert bool(values.any()) == bool(rows[index])


def test_pruning_leaves_scores_alone() -> None:
    topology = bound("residual")
    before = lap_ext.scores(topology.model, None, topology=topology)
    prune(topology, 0.5, apply=False)
    prune(topology, 0.5, apply=False, scope="global", rounds=2)
    after = lap_ext.scores(topology.model, None, topology=topology)
    for name, value in before.items():
        assert torch.equal(value, after[name])


# Channels of queries and of keys are both producers: what one reads is the other. Entries of a tied
# table are made and read.
FREE = [x for x in CASES if x not in (("packed", "channel"), ("gqa", "channel"))]
FREE.remove(("tied", "channel"))


@pytest.mark.parametrize(("name", "kind"), FREE)
def test_nobody_reads_what_producers_of_removed_units_hold(name: str, kind: str) -> None:
    topology = traced(name).bind(made(name, dtype=torch.float64))
    model = topology.model
    prune(topology, 0.5, kind)
    inputs = [x.double() if x.is_floating_point() else x for x in INPUTS[name]()]
    expected = model(*inputs)
    made_, read = set[unit_oracle.Weight](), set[unit_oracle.Weight]()
    for group in topology.groups(kind):
        members = group.members
        if kind == "expert":  # its first layer alone
            members = tuple(x for x in members if ".0." in x.parameter.removeprefix("experts.0"))
        own = unit_oracle.sides(members, model, unit_oracle.flipped(topology))
        if not any(bool(model.get_parameter(n).flatten()[i]) for n, i in own[0] | own[1]):
            made_ |= own[0]
            read |= own[1]
    assert made_
    unit_oracle.put_random(model, made_ - read)
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-9)
