# SPDX-License-Identifier: MIT
"""Pruner in a training loop: the model stays as it was; AMP, averages, torch.compile, processes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lap_ext
from lap_ext.pruning.pruner import Pruner
from lap_ext.schedule import cubic, iterative, linear, one_shot
from tests.helpers import masked_network as cases
from tests.helpers.processes import two_processes
from tests.helpers.pruner_training import EXAMPLE, train

# --- the model stays the user's -------------------------------------------------------------------


def with_norm() -> nn.Sequential:
    """A batch norm in evaluation mode and a dropout within a model that is trained."""
    net = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3),
            norm=nn.BatchNorm2d(4),
            act=nn.ReLU(),
            flat=nn.Flatten(),
            drop=nn.Dropout(0.5),
            fc=nn.Linear(64, 3),
        )
    )
    net.norm.eval()
    return net


@pytest.mark.parametrize("criterion", ["lookahead", "lookahead_act", "weight_gradient"])
def test_modes_hooks_names_and_random_numbers_are_as_they_were(criterion: str) -> None:
    net, data = with_norm(), None if criterion == "lookahead" else cases.batches(2)
    optimizer = torch.optim.Adam(net.parameters())
    modes = {name: module.training for name, module in net.named_modules()}
    state = copy.deepcopy(net.state_dict())
    parameters, random = list(net.parameters()), torch.get_rng_state()
    schedule = one_shot(0.5, at=1)
    pruner = Pruner(net, EXAMPLE, schedule, optimizer=optimizer, criterion=criterion, data=data)
    pruner.step()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    pruner.step()
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert list(net.state_dict()) == list(state)
    assert torch.equal(net.norm.running_mean, state["norm.running_mean"])
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(p.grad is None and p.requires_grad for p in parameters)
    for module in net.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, traced = cases.net(), []

    def counted(*args: Any, **kwargs: Any) -> lap_ext.Topology:
        traced.append(args)
        return lap_ext.trace(*args, **kwargs)

    monkeypatch.setattr("lap_ext.pruning.plan.trace", counted)
    first = Pruner(model, EXAMPLE, linear(0.5, start=0, end=4))
    for _ in range(5):
        first.step()
    assert len(traced) == 1 and first.sparsity == 0.5
    second = Pruner(model, None, linear(0.9, start=0, end=4), topology=first.topology)
    second.step()
    assert len(traced) == 1 and second.topology is first.topology


def test_options_reach_the_trace_and_the_pruning() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.b(torch.linalg.matrix_exp(self.a(x)) * scale)

    net, named = Named(), {"x": torch.ones(4, 4), "scale": torch.ones(4)}
    with pytest.raises(lap_ext.TopologyError, match="matrix_exp"):
        Pruner(net, named, one_shot(0.5))
    neighbors = {"a": (None, None), "b": (None, None)}
    options: dict[str, Any] = {"criterion": "lookback", "exclude": ["b"], "neighbors": neighbors}
    pruner = Pruner(net, named, one_shot(0.5), **options)
    pruner.step()
    assert pruner.result.criterion == "lookback" and list(pruner.masks) == ["a"]


# --- what training is wrapped in ------------------------------------------------------------------


def test_a_pruner_that_does_not_prune_changes_no_bit() -> None:
    """Dropout, batch norm, momentum: trained with it as without it."""
    found = []
    for pruned in (False, True):
        torch.manual_seed(0)
        net = with_norm().train()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        never = Pruner(net, EXAMPLE, lambda _: None, optimizer=optimizer) if pruned else None
        train(net, optimizer, 4, never)
        found.append(net.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_accumulation() -> None:
    """step follows the optimizer's: gradients that add up over batches are those of one batch."""
    model, data = cases.net(torch.float64), cases.batches(16, torch.float64)
    other = copy.deepcopy(model)
    found = []
    for each, parts in ((model, 1), (other, 2)):
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)
        pruner = Pruner(each, EXAMPLE.double(), cubic(0.8, start=2, end=10), optimizer=optimizer)
        for x, y in data:
            optimizer.zero_grad()
            for part in range(parts):
                (cases.loss_of(each, (x[part::parts], y[part::parts])) / parts).backward()
            optimizer.step()
            pruner.step()
            cases.check_zero(each, pruner.masks)
        found.append(pruner.masks)
    assert found[0] == found[1] and found[0].sparsity > 0.79
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inside", [False, True], ids=["after autocast", "within autocast"])
def test_autocast_and_grad_scaler(inside: bool) -> None:
    """The masks are those of the float32 weights, wherever step is called."""
    model = cases.net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    pruner = Pruner(model, EXAMPLE, iterative(0.4, rounds=4, every=2), optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for number, batch in enumerate(cases.batches(10)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cases.loss_of(model, batch)
        scaler.scale(loss).backward()
        if number == 5:
            model.fc2.bias.grad[0] = float("inf")  # a step that the scaler skips
        scaler.step(optimizer)
        scaler.update()
        cases.check_zero(model, pruner.masks)
        sparsity = iterative(0.4, rounds=4, every=2)(number)
        if sparsity is not None:
            expected = lap_ext.prune(model, EXAMPLE, sparsity, masks=pruner.masks, apply=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            pruner.step()
        assert pruner.masks == expected.masks
        cases.check_zero(model, pruner.masks)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "module"])
def test_compiled_model(whole: bool) -> None:
    """Before and after the first call; the names are those of the plain model."""
    model, data = cases.net(), cases.batches(8)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    if whole:
        compiled: Any = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.compile(backend="eager")
    cases.loss_of(compiled, data[0])
    found = []
    for each in (compiled, plain):
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)
        pruner = Pruner(each, EXAMPLE, cubic(0.8, start=0, end=5), optimizer=optimizer)
        for batch in data:
            cases.train(each, optimizer, [batch])
            pruner.step()
            cases.check_zero(model if each is compiled else plain, pruner.masks)
        found.append(pruner.masks)
    assert list(found[0]) == ["conv", "fc1", "fc2"]
    assert found[0] == found[1]


def test_compiled_step() -> None:
    """A compiled optimizer step sees the masks of the last pruning, not of the first."""
    model = cases.net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    pruner = Pruner(model, EXAMPLE, iterative(0.3, rounds=3, every=2), optimizer=optimizer)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    for batch in cases.batches(7):
        optimizer.zero_grad()
        cases.loss_of(model, batch).backward()
        step()
        cases.check_zero(model, pruner.masks)
        pruner.step()


def test_averages() -> None:
    """An average begun before a pruning needs the masks once, as the docstring says."""
    model = cases.net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = Pruner(model, EXAMPLE, iterative(0.5, rounds=3, every=3), optimizer=optimizer)
    for batch in cases.batches(9):
        cases.train(model, optimizer, [batch])
        if pruner.step():
            pruner.masks.apply(average)
        average.update_parameters(model)
        cases.check_zero(average.module, pruner.masks)


def test_the_model_moves_on_the_way(device: str) -> None:
    """Another dtype and device between two prunings; masks follow their parameters."""
    model = cases.net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for trains in (optimizer, None):
        pruner = Pruner(model, EXAMPLE, iterative(0.5, rounds=2, every=2), optimizer=trains)
        for kind, place in ((torch.float32, "cpu"), (torch.float64, device)):
            model.to(place, kind)
            optimizer.state.clear()
            for x, y in cases.batches(2):
                cases.train(model, optimizer, [(x.to(place, kind), y.to(place))])
                pruner.step()
        assert all(mask.device.type == device for mask in pruner.masks.values())
        assert pruner.sparsity == 0.75
        cases.check_zero(model.cpu(), pruner.masks.to("cpu"))
        pruner.remove()
        model.float()


def test_tied_weights() -> None:
    """One tensor is one layer, under its first name."""
    embed, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Tanh(), head)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    schedule = iterative(0.5, rounds=2, every=2)
    pruner = Pruner(model, torch.arange(6), schedule, optimizer=optimizer, layers="*")
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
        pruner.step()
        assert torch.equal(model[2].weight != 0, pruner.masks["0"])
    assert pruner.masks.counts() == {"0": (6, 24)}


# --- several processes ----------------------------------------------------------------------------


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors of both processes, each as one vector."""
    flat = torch.cat([x.detach().flatten().float() for x in tensors])
    every = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(every, flat)
    return every


def trial(rank: int, kind: str) -> None:
    """One training with batches of the process's own; both processes stay one model."""
    torch.manual_seed(0)
    model = with_norm().train() if kind == "batch norm" else cases.net()
    parallel: Any = DistributedDataParallel(model)
    if kind == "compiled":
        parallel = torch.compile(parallel, backend="eager")
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9)
    schedule = cubic(0.9, start=1, end=7, every=2)
    pruner = Pruner(parallel, EXAMPLE, schedule, optimizer=optimizer)
    torch.manual_seed(rank)
    alone_differ = False
    for step, (x, y) in enumerate(cases.batches(10)):
        cases.train(parallel, optimizer, [(x * (1 + 5 * rank), y)])
        if schedule(step) is not None:
            alone = lap_ext.prune(model, EXAMPLE, schedule(step), masks=pruner.masks, apply=False)
            mine, theirs = gathered(list(alone.masks.values()))
            alone_differ |= not torch.equal(mine, theirs)
        pruner.step()
        cases.check_zero(model, pruner.masks)
        for tensors in (list(model.parameters()), list(pruner.masks.values())):
            assert not tensors or torch.equal(*gathered(tensors)), kind
    assert pruner.sparsity > 0.89
    assert alone_differ == (kind == "batch norm"), "why the first process decides"
    pruner.remove()


def worker(rank: int, folder: str) -> None:
    """One of two processes."""
    for kind in ("plain", "batch norm", "compiled"):
        trial(rank, kind)


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, on this machine only.

    What a batch norm has seen differs between the processes, and so would their masks.
    """
    two_processes(worker, tmp_path)
