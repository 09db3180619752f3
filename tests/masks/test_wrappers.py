# SPDX-License-Identifier: MIT
"""Masks.keep among what training is wrapped in: AMP, averages, torch.compile, several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lap_ext.masks import Masks
from tests.helpers import masked_network as cases
from tests.helpers.parameters import needs_cuda
from tests.helpers.processes import two_processes


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_and_grad_scaler(fused: bool) -> None:
    """bfloat16 products, scaled gradients, one step that the scaler skips: as weight * mask."""
    model, data = cases.net(), cases.batches(8)
    masks = cases.random_masks(model)
    masks.apply(model)
    other = cases.multiplied(copy.deepcopy(model), masks)
    for each, keeping in ((model, True), (other, False)):
        optimizer = torch.optim.AdamW(
            cases.in_order(each) if each is other else each.parameters(), 0.01, fused=fused
        )
        if keeping:
            masks.keep(each, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for number, batch in enumerate(data):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = cases.loss_of(each, batch)
            scaler.scale(loss).backward()
            if number == 4:
                each.fc2.bias.grad[0] = float("inf")
            if number % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_value_(each.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() != 2.0**10
    cases.check_zero(model, masks)
    cases.check_agree(model, other, masks)


def test_half_precision_weights() -> None:
    model, data = cases.net(torch.bfloat16), cases.batches(4, torch.bfloat16)
    masks = cases.random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with masks.keep(model, optimizer):
        cases.train(model, optimizer, data)
    cases.check_zero(model, masks)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages(kind: str) -> None:
    """A copy begun after the pruning stays pruned; one begun before needs apply, once."""
    model, data = cases.net(), cases.batches(6)
    function = get_ema_multi_avg_fn(0.9) if kind == "ema" else None
    before = AveragedModel(model, multi_avg_fn=function)
    before.update_parameters(model)
    masks = cases.random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    masks.keep(model, optimizer)
    after = AveragedModel(model, multi_avg_fn=function)
    for number, batch in enumerate(data):
        cases.train(model, optimizer, [batch])
        for average in (before, after):
            average.update_parameters(model)
        cases.check_zero(after.module, masks)
        if number < 3:
            assert before.module.fc1.weight[~masks["fc1"]].any(), "why apply is needed"
        if number == 2:
            masks.apply(before)
        if number >= 2:
            cases.check_zero(before.module, masks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(backend: str) -> None:
    """keep before or after torch.compile, through the compiled module or the plain one."""
    model, data = cases.net(), cases.batches(6)
    masks = cases.random_masks(model)
    masks.apply(model)
    other = cases.multiplied(copy.deepcopy(model), masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    compiled = torch.compile(model, backend=backend)
    cases.loss_of(compiled, data[0])
    with masks.keep(compiled, optimizer):
        cases.train(compiled, optimizer, data)
    cases.train(other, torch.optim.SGD(cases.in_order(other), 0.1, momentum=0.9), data)
    cases.check_zero(model, masks)
    for name, mask in masks.items():
        mine, theirs = model.get_submodule(name).weight, other.get_submodule(name).weight
        assert torch.allclose(mine[mask], theirs[mask], rtol=1e-5, atol=1e-7), name


def test_compiled_step() -> None:
    """torch.compile traces through the hooks."""
    model, data = cases.net(), cases.batches(3)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    masks.keep(model, optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for batch in data:
        optimizer.zero_grad()
        cases.loss_of(model, batch).backward()
        step()
        cases.check_zero(model, masks)
        momentum = optimizer.state[model.fc1.weight]["momentum_buffer"]
        assert not momentum[~masks["fc1"]].any() and momentum.any()


def test_data_parallel() -> None:
    model, data = nn.DataParallel(cases.net()), cases.batches(3)
    masks = cases.random_masks(model.module)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with masks.keep(model, optimizer):
        cases.train(model, optimizer, data)
    cases.check_zero(model.module, masks)


def test_the_model_moves_after_keep(device: str) -> None:
    """Masks follow their parameters, as the optimizer does."""
    model, data = cases.net(), cases.batches(2)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks.keep(model, optimizer)
    model.to(device).double()
    cases.train(model, optimizer, [(x.to(device).double(), y.to(device)) for x, y in data])
    assert model.conv.weight.dtype == torch.float64
    cases.check_zero(model.cpu(), masks)


def test_channels_last() -> None:
    model, data = cases.net().to(memory_format=torch.channels_last), cases.batches(3)
    masks = cases.random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    with masks.keep(model, optimizer):
        cases.train(model, optimizer, data)
    cases.check_zero(model, masks)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_weights() -> None:
    """Both uses add to one gradient; the one tensor stays pruned under either name."""
    embed, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Tanh(), head)
    masks = Masks({"2": torch.rand(6, 4) < 0.5})
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    with masks.keep(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(6)).square().sum().backward()
            optimizer.step()
    assert torch.equal(model[0].weight != 0, masks["2"])


# --- several processes ----------------------------------------------------------------------------


def worker(rank: int, directory: str) -> None:
    """One of two processes that share each batch; the first writes what both have."""
    for buckets in (False, True):  # gradients of their own, or views of the buckets
        state: dict[str, Any] = torch.load(f"{directory}/start.pt")
        model, masks = cases.net(), Masks(state["masks"])
        model.load_state_dict(state["model"])
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=buckets)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        masks.keep(parallel, optimizer)
        for x, y in state["data"]:
            cases.train(parallel, optimizer, [(x[rank::2], y[rank::2])])
            cases.check_zero(model, masks)
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        every = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(every, flat)
        assert torch.equal(every[0], every[1]), "the processes stay one model"
        if rank == 0:
            torch.save(model.state_dict(), f"{directory}/end-{buckets}.pt")


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, on this machine only."""
    model, data = cases.net(), cases.batches(4)
    masks = cases.random_masks(model)
    start = {"model": model.state_dict(), "masks": dict(masks), "data": data}
    torch.save(start, tmp_path / "start.pt")
    two_processes(worker, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    masks.keep(model, optimizer)
    cases.train(model, optimizer, data)
    for buckets in (False, True):
        end = torch.load(tmp_path / f"end-{buckets}.pt")
        for name, parameter in model.named_parameters():  # halves of a batch add in another order
            assert torch.allclose(end[name], parameter, rtol=1e-4, atol=1e-6), name


# --- a GPU ----------------------------------------------------------------------------------------


# torch advises against capturable=True where a step is not captured
uncaptured = pytest.mark.filterwarnings("ignore:.*capturable=True:UserWarning")


@needs_cuda
@uncaptured
@pytest.mark.parametrize("kind", ["fused", "foreach", "capturable"])
def test_cuda_optimizers(kind: str) -> None:
    model, data = cases.net().cuda(), cases.batches(4)
    masks = cases.random_masks(model.cpu()).to("cuda")
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, **{kind: True})
    with masks.keep(model, optimizer):
        cases.train(model, optimizer, [(x.cuda(), y.cuda()) for x, y in data])
    cases.check_zero(model, masks)


@needs_cuda
@uncaptured
def test_cuda_graph() -> None:
    """A captured step masks too: the hooks wait for nothing and write in place."""
    weight = nn.Parameter(torch.randn(64, 64, device="cuda"))
    model = nn.Module()
    model.weight = weight
    masks = Masks({"weight": torch.rand(64, 64, device="cuda") < 0.5})
    optimizer = torch.optim.AdamW([weight], 0.01, capturable=True)
    masks.keep(model, optimizer)
    target = torch.randn(64, 64, device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = (weight - target).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = weight.detach().clone()
    for _ in range(3):
        graph.replay()
    assert torch.equal(weight != 0, masks["weight"]) and not torch.equal(weight, before)
