# SPDX-License-Identifier: MIT
"""A topology for other models of the same structure, and one that is older than its model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext


class Branched(nn.Module):
    """Grouped convolution, a permutation in a buffer, tied weights, a batch norm, attributes."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, heads: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.act, self.heads, self.calls = act, heads, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.conv(x)).mean((2, 3))[:, self.order]
        y = self.a(x).unflatten(1, (self.heads, -1)).flip(1).flatten(1)
        return self.b(self.act(y))


X = torch.ones(2, 4, 3, 3)


def branched(**how: Any) -> Branched:
    torch.manual_seed(0)
    model = Branched(**how).eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            parameter.uniform_(0.2, 1.2)
    model.calls = 0
    return model


def trained(model: nn.Module) -> nn.Module:
    """Other weights and statistics."""
    with torch.no_grad():
        for x in [*model.parameters(), model.norm.running_var]:
            x.mul_(1 + torch.rand_like(x))
    return model


SAME: dict[str, Callable[[Branched], nn.Module]] = {
    "a_deep_copy": copy.deepcopy,
    "a_copy_with_other_weights": lambda m: trained(copy.deepcopy(m)),
    "built_again": lambda m: branched(),
    "in_float64": lambda m: copy.deepcopy(m).double(),
    "in_bfloat16": lambda m: copy.deepcopy(m).bfloat16(),
    "in_training": lambda m: copy.deepcopy(m).train(),
    "data_parallel": lambda m: nn.DataParallel(copy.deepcopy(m)),
    "compiled": lambda m: torch.compile(copy.deepcopy(m)),
}


@pytest.mark.parametrize("name", list(SAME))
def test_a_model_of_the_same_structure_needs_no_trace(name: str) -> None:
    model = branched()
    topology = lap_ext.trace(model, X)
    model.calls = 0
    other = SAME[name](model)
    own = getattr(other, "module", getattr(other, "_orig_mod", other))
    own.calls = 0
    expected = lap_ext.scores(own, X.to(own.conv.weight.dtype))
    own.calls = 0
    found = lap_ext.scores(other, topology=topology)
    assert found.keys() == expected.keys() == {"conv", "a"}
    assert all(torch.equal(found[layer], x) for layer, x in expected.items())
    assert lap_ext.prune(other, None, 0.5, topology=topology).kept == 12
    assert lap_ext.sparsity(model) == 0.0 < lap_ext.sparsity(other)
    bound = topology.bind(other)
    assert bound is not topology and bound.bind(other) is bound
    pruner = lap_ext.Pruner(other, None, lap_ext.one_shot(0.5), topology=topology)
    assert pruner.topology.model is own and topology.model is model


def permuted(m: Branched) -> nn.Module:
    m.order.copy_(torch.arange(4))
    return m


def untied(m: Branched) -> nn.Module:
    m.b.weight = nn.Parameter(m.a.weight.detach().clone())
    return m


def with_layer(name: str, layer: nn.Module) -> Callable[[Branched], nn.Module]:
    return lambda m: setattr(m, name, layer) or m


OTHER: dict[str, tuple[Callable[[Branched], nn.Module], str]] = {
    "replaced_by_another_class": (
        with_layer("norm", nn.Identity()),
        "module 'norm' torch.nn.modules.linear.Identity "
        "(traced: torch.nn.modules.batchnorm.BatchNorm2d). Trace this model: pass example_inputs,",
    ),
    "resized": (with_layer("conv", nn.Conv2d(8, 4, 1)), "conv.in_channels 8 (traced: 4). Trace"),
    "other_groups": (with_layer("conv", nn.Conv2d(4, 4, 1)), "conv.groups 1 (traced: 2). Trace"),
    "other_stride": (
        with_layer("conv", nn.Conv2d(4, 4, 1, 2, groups=2)),
        "conv.stride (2, 2) (traced: (1, 1))",
    ),
    "removed": (lambda m: delattr(m, "b") or m, "module 'b' missing (traced: torch.nn.modules."),
    "added": (
        with_layer("c", nn.Linear(4, 4)),
        "module 'c' torch.nn.modules.linear.Linear",
    ),
    "untied": (untied, "parameter 'b.weight' [4, 4] (traced: [4, 4], the same as 'a.weight')"),
    "permuted": (permuted, "other values in the buffer 'order', which say which channel is which"),
    "no_bias": (with_layer("a", nn.Linear(4, 4, bias=False)), "parameter 'a.bias' missing (traced"),
}


@pytest.mark.parametrize("name", list(OTHER))
def test_another_structure_is_named(name: str) -> None:
    change, text = OTHER[name]
    model = branched()
    topology = lap_ext.trace(model, X)
    with pytest.raises(ValueError, match=re.escape(text)):
        topology.bind(change(copy.deepcopy(model)))
    changed = change(model)  # the topology is older than its model
    before = copy.deepcopy(changed.state_dict())
    text = f"got another structure: {text}"
    for call in (
        lambda: lap_ext.prune(changed, None, 0.5, topology=topology),
        lambda: lap_ext.scores(changed, topology=topology),
        lambda: lap_ext.Pruner(changed, None, lap_ext.one_shot(0.5), topology=topology),
        lambda: topology.bind(changed),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert text in str(error.value)
    assert all(torch.equal(x, before[key]) for key, x in changed.state_dict().items())


ATTRIBUTES: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"heads": 4}, "heads 4 (traced: 2)"),
    "function": ({"act": torch.tanh}, "(traced: torch.nn.functional.relu, line "),
    "lambda": ({"act": lambda x: x}, "act tests.topology.test_bind.<lambda>"),
}


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_attributes_of_another_model_count(name: str) -> None:
    how, text = ATTRIBUTES[name]
    topology = lap_ext.trace(branched(), X)
    topology.model.calls = 0
    with pytest.raises(ValueError, match="got another structure: ") as error:
        topology.bind(branched(**how))
    assert text in str(error.value)


def test_counts_of_the_traced_model_may_change() -> None:
    model = branched()
    topology = lap_ext.trace(model, X)
    model(X)
    model.note = {"loss": [0.5, torch.ones(2)]}
    assert topology.bind(model) is topology


def recast(model: nn.Module) -> nn.Module:
    return model.double()


def replaced(model: nn.Module) -> nn.Module:
    model.conv = trained_conv()
    return model


def trained_conv() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 1, groups=2)
    conv.weight.data.copy_(torch.arange(1.0, 9.0).view(4, 2, 1, 1))
    return conv


@pytest.mark.parametrize("change", [recast, replaced], ids=["cast", "replaced"])
def test_a_topology_older_than_its_model_reads_the_model_as_it_is(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    model = branched()
    topology = lap_ext.trace(model, X)
    changed = change(model)
    expected = lap_ext.scores(changed, X.to(changed.a.weight.dtype))
    found = lap_ext.scores(changed, topology=topology)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


class Gated(nn.Module):
    """A constant mask of channels beside a parameter, named as torch's pruning names its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.ones(4))
        self.register_buffer("gate_mask", torch.tensor([True, False, False, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.gate).masked_fill(self.gate_mask, 0.0))


def test_a_constant_that_is_named_like_a_mask() -> None:
    model = Gated()
    topology = lap_ext.trace(model, torch.ones(1, 3))
    assert lap_ext.prune(model, None, 0.5, topology=topology, apply=False).kept == 10
    other = Gated()
    other.gate_mask.logical_not_()
    with pytest.raises(ValueError, match="other values in the buffer 'gate_mask'"):
        topology.bind(other)


def test_a_trace_on_meta_serves_the_real_model() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("order", torch.tensor([2, 0, 1, 3]))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[:, self.order])

    real = Permuted()
    with pytest.warns(UserWarning, match="counts as a boundary"):  # its values are not known
        topology = lap_ext.trace(Permuted().to("meta"), torch.ones(1, 3), on_unsupported="cut")
    assert topology.bind(real).model is real
