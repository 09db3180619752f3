# SPDX-License-Identifier: MIT
"""PruningCallback in Lightning's Trainer, on the CPU; the oracle is the loop written out."""

from __future__ import annotations

import copy
import csv
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from tests.helpers import masked_network as cases
from tests.helpers.processes import run_python, two_processes

pytest.importorskip("lightning", reason="the framework of this adapter")

import lightning.pytorch as pl
from lightning.pytorch import callbacks, loggers, strategies

from lap_ext.adapters.lightning import PruningCallback, load_masks
from tests.helpers.lightning_training import (
    EXAMPLE,
    NAMES,
    RATE,
    Batches,
    Net,
    check_no_hooks,
    checkpoints,
    trainer_of,
    watched,
    written_out,
)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_kept_masks(accumulate: int) -> None:
    """Bit for bit the loop in which pruned weights do not exist, in the clipped norm neither."""
    model = Net()
    masks = lap_ext.prune(model, EXAMPLE, 0.6).masks
    other = copy.deepcopy(model)
    trainer = trainer_of(PruningCallback(masks), accumulate_grad_batches=accumulate)
    trainer.fit(model, Batches())
    cases.check_zero(model, masks)
    _, norms = written_out(other, lambda step: None, masks, accumulate=accumulate)
    cases.check_equal(model, other)
    assert model.norms == pytest.approx(norms, rel=1e-6)
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(masks.sparsity)
    check_no_hooks(trainer, model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedule(tmp_path: Path, accumulate: int) -> None:
    """The masks of the schedule's own loop, at the optimizer's steps and not at the batches."""
    model = Net()
    other = copy.deepcopy(model)
    schedule = lap_ext.cubic(0.8, start=1, end=7 // accumulate, every=3 // accumulate)
    pruning = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
    logger = loggers.CSVLogger(tmp_path)
    given = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1, "logger": logger}
    trainer = trainer_of(pruning, **given)
    trainer.fit(model, Batches())
    masks, norms = written_out(other, schedule, accumulate=accumulate)
    cases.check_equal(model, other)
    assert model.norms == pytest.approx(norms, rel=1e-6)
    assert pruning.masks == masks and pruning.result is not None
    assert [row.name for row in pruning.result.layers] == list(NAMES)
    expected = [0.0] * 4 + [0.7] * 3 + [0.8] * 3
    if accumulate == 2:  # steps 1, 2 and 3 are batches 3, 5 and 7 (from 0); the first prunes 0
        expected = [0.0] * 5 + [0.7] * 2 + [0.8] * 3
    assert watched(trainer) == expected
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [round(float(row["sparsity"]), 2) for row in csv.DictReader(file)]
    assert logged == expected[accumulate - 1 :: accumulate]
    check_no_hooks(trainer, model)


@pytest.mark.parametrize("kind", ["schedule", "masks"])
def test_two_optimizers_by_hand(kind: str) -> None:
    """Manual optimization; the head is trained by an optimizer that has nothing to prune."""

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
            body, head = self.optimizers()
            loss = super().training_step(batch)
            body.zero_grad(), head.zero_grad()
            self.manual_backward(loss)
            self.norms.append(float(self.net.conv.weight.grad.count_nonzero()))
            body.step(), head.step()

        def configure_optimizers(self) -> Any:
            body = [*self.net.conv.parameters(), *self.net.fc1.parameters()]
            head = torch.optim.SGD(self.net.fc2.parameters(), RATE)
            return torch.optim.AdamW(body, RATE), head

    model = Manual()
    schedule = lap_ext.one_shot(0.5, at=7)  # the second of the fourth batch
    if kind == "schedule":
        given = {"example_inputs": EXAMPLE, "exclude": "*fc2"}
        pruning = PruningCallback(schedule=schedule, **given)
    else:
        pruning = PruningCallback(cases.random_masks(model, NAMES[:2]))
    trainer = trainer_of(pruning, gradient_clip_val=None)
    trainer.fit(model, Batches())
    assert trainer.global_step == 20 and set(pruning.masks) == set(NAMES[:2])
    kept = int(pruning.masks["net.conv"].sum())
    if kind == "schedule":
        assert watched(trainer) == [0.0] * 3 + [0.5] * 7
        assert model.norms == [36] * 4 + [kept] * 6
    else:
        assert model.norms == [kept] * 10


@pytest.mark.parametrize("how", ["compiled", "bf16", "own example", "topology"])
def test_other_ways_to_train(how: str) -> None:
    model: Any = Net()
    given: dict[str, Any] = {"example_inputs": {"x": EXAMPLE}}
    if how == "own example":
        model.example_input_array, given = EXAMPLE, {}
    if how == "topology":
        given = {"topology": lap_ext.trace(model, EXAMPLE)}
    pruning = PruningCallback(schedule=lap_ext.one_shot(0.7, at=2), scope="global", **given)
    trainer = trainer_of(pruning, precision="bf16-mixed" if how == "bf16" else None)
    trainer.fit(torch.compile(model, backend="eager") if how == "compiled" else model, Batches())
    assert pruning.sparsity == pytest.approx(0.7, abs=1e-3)
    assert set(pruning.masks) == set(NAMES)
    cases.check_zero(model, pruning.masks)


def test_nothing_but_training() -> None:
    model = Net()
    pruning = PruningCallback(schedule=lap_ext.one_shot(0.7, at=2), example_inputs=EXAMPLE)
    pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[pruning]).fit(
        model, Batches()
    )  # it would warn of logs
    cases.check_zero(model, pruning.masks)
    assert pruning.sparsity > 0.69


class OwnAverage(callbacks.Callback):
    """Someone's own average of the weights, as tensors; it is copied back when training ends."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for mine, theirs in zip(self.average, pl_module.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 0.1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for mine, theirs in zip(self.average, pl_module.parameters(), strict=True):
            theirs.data.copy_(mine)


AVERAGES = {
    "EMA": lambda: callbacks.EMAWeightAveraging(decay=0.9),
    "SWA": lambda: callbacks.StochasticWeightAveraging(swa_lrs=RATE, swa_epoch_start=1),
    "own": OwnAverage,
}


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_average_of_the_weights(kind: str, first: bool, tmp_path: Path) -> None:
    """Pruned weights are zero in the average, in what is validated, saved and left at the end."""

    class Validated(Net):
        def on_validation_epoch_end(self) -> None:
            found.append(pruning.masks.check(self))

        def validation_step(self, batch: Any) -> None:
            pass

    found: list[dict[str, int]] = []
    model, average = Validated(), AVERAGES[kind]()
    schedule = lap_ext.cubic(0.8, start=2, end=6, every=2)
    pruning = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
    last = callbacks.ModelCheckpoint(tmp_path, save_last=True)
    clip = {"gradient_clip_val": None, "max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = trainer_of(pruning, last, **clip)
    trainer.callbacks.insert(0 if first else 1, average)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        trainer.fit(model, Batches(4), Batches(1))
    cases.check_zero(model, pruning.masks)
    assert 0.79 < lap_ext.sparsity(model) < 0.9 and found and not any(found)
    unknown = [x for x in told if "that another callback has written" in str(x.message)]
    assert len(unknown) == (kind == "own" and not first)
    saved = Net()
    saved.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    cases.check_zero(saved, load_masks(tmp_path / "last.ckpt"))


def test_exception_leaves_nothing() -> None:
    class Breaks(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                raise OSError("the disk is gone")

    model = Breaks()
    pruning = PruningCallback(schedule=lap_ext.one_shot(0.7, at=2), example_inputs=EXAMPLE)
    trainer = trainer_of(pruning)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(model, Batches())
    check_no_hooks(trainer, model)
    assert pruning.state_dict()["step"] == 5 and pruning.sparsity > 0.69


def test_refused() -> None:
    masks = {"net.conv": torch.ones(4, 1, 3, 3) == 1}
    schedule = lap_ext.one_shot(0.5)
    model, batches = Net(), Batches(2)
    with pytest.raises(TypeError, match=r"PruningCallback: expected either masks .* got neither"):
        PruningCallback()
    with pytest.raises(TypeError, match=r"expected masks alone .nothing is scored., got criterion"):
        PruningCallback(masks, criterion="magnitude")
    with pytest.raises(TypeError, match=r"got rounds, example_inputs too. Leave them out."):
        PruningCallback(masks, rounds=2, example_inputs=EXAMPLE)
    with pytest.raises(TypeError, match=r"Net has no example_input_array. Pass a small batch"):
        trainer_of(PruningCallback(schedule=schedule)).fit(model, batches)
    with pytest.raises(ValueError, match="the model has no such parameter"):
        trainer_of(PruningCallback({"conv": masks["net.conv"]})).fit(model, batches)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsity'"):
        PruningCallback(schedule=schedule, example_inputs=EXAMPLE, sparsity=0.5)
    with pytest.raises(ValueError, match=r"PruningCallback: expected scope to be 'layer' or 'glob"):
        wrong = PruningCallback(schedule=schedule, example_inputs=EXAMPLE, scope="all")
        trainer_of(wrong).fit(model, batches)
    for kind in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        strategy = object.__new__(type("Mine", (getattr(strategies, kind),), {}))
        with pytest.raises(ValueError, match=f"expected whole parameters in each .*got {kind}."):
            PruningCallback(masks).setup(SimpleNamespace(strategy=strategy), model, "fit")


ALONE = """
import sys, torch, lap_ext
sys.modules["lightning"] = None
import pytorch_lightning as pl
from lap_ext.adapters.lightning import PruningCallback

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)
    def forward(self, x):
        return self.net(x)
    def training_step(self, x):
        return self(x).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

pruning = PruningCallback(schedule=lap_ext.one_shot(0.5, at=1), example_inputs=torch.ones(1, 4))
trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=pruning, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False)
trainer.fit(Net(), torch.randn(8, 16, 4))
assert int(pruning.masks["net"].sum()) == int(trainer.model.net.weight.count_nonzero()) == 4

sys.modules["pytorch_lightning"] = None
del sys.modules["lap_ext.adapters.lightning"]
import lap_ext.adapters.lightning
"""


def test_without_its_framework() -> None:
    """pytorch_lightning alone will do; without either it says so."""
    pytest.importorskip("pytorch_lightning")
    run = run_python(ALONE)
    text = "expected the lightning package (or pytorch_lightning), got none that can be imported"
    assert run.returncode == 1 and text in run.stderr.splitlines()[-1], run.stderr


def test_trainer_of_the_other_name() -> None:
    """A Trainer of pytorch_lightning takes the callback of lightning, in a list."""
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        forward, training_step = Net.forward, Net.training_step
        configure_optimizers = Net.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net = cases.net()

    model = Other()
    pruning = PruningCallback(schedule=lap_ext.one_shot(0.7, at=1), example_inputs=EXAMPLE)
    assert not isinstance(pruning, other.Callback)
    trainer = other.Trainer(
        max_steps=3,
        accelerator="cpu",
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Batches())
    assert pruning.sparsity > 0.69
    cases.check_zero(model, pruning.masks)
    state = trainer._checkpoint_connector.dump_checkpoint()["callbacks"]
    assert state[pruning.state_key]["step"] == 3


def worker(rank: int, directory: str) -> None:
    """One of two processes, each with its own half of the data."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # required, not used
    torch.manual_seed(0)
    model = Net()
    schedule = lap_ext.cubic(0.8, start=1, end=7, every=3)
    criterion = "lookback" if rank else "lookahead"  # the masks are those of the first process
    pruning = PruningCallback(schedule=schedule, example_inputs=EXAMPLE, criterion=criterion)
    ddp = strategies.DDPStrategy(process_group_backend="gloo")
    trainer = trainer_of(pruning, checkpoints(Path(directory)), strategy=ddp, devices=2)
    seen = []
    model.register_full_backward_hook(lambda *_: seen.append(type(trainer.model)))
    trainer.fit(model, Batches(10, start=10 * rank))
    assert trainer.world_size == 2 and trainer.global_rank == rank
    assert seen and set(seen) == {nn.parallel.DistributedDataParallel}
    tensors = [*model.parameters(), *(mask.float() for mask in pruning.masks.values())]
    mine = torch.cat([x.detach().flatten() for x in tensors])
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both) and pruning.sparsity > 0.79


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, on this machine only."""
    two_processes(worker, tmp_path)
    assert load_masks(tmp_path / "epoch=0-sparsity=0.8.ckpt").sparsity > 0.79
