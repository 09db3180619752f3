# SPDX-License-Identifier: MIT
"""PruningCallback of Lightning: checkpoints, further training, searches that go back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lap_ext
from tests.helpers import masked_network as cases

pytest.importorskip("lightning", reason="the framework of this adapter")

import lightning.pytorch as pl
from lightning.pytorch import callbacks

from lap_ext.adapters.lightning import STATE_KEY, PruningCallback, load_masks
from tests.helpers.lightning_training import (
    EXAMPLE,
    NAMES,
    RATE,
    Batches,
    Net,
    Watch,
    checkpoints,
    trainer_of,
    watched,
)


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")  # it is the same one
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    schedule = lap_ext.cubic(0.8, start=1, end=16, every=2)
    model, batches = Net(), Batches(5)
    start = copy.deepcopy(model)

    def new() -> PruningCallback:
        return PruningCallback(schedule=schedule, example_inputs=EXAMPLE)

    uninterrupted = new()
    trainer_of(uninterrupted, checkpoints(tmp_path), max_epochs=4).fit(model, batches)
    second = tmp_path / "epoch=1-sparsity=0.7.ckpt"  # ModelCheckpoint saw what had been logged
    saved = load_masks(second)
    assert 0.5 < saved.sparsity < uninterrupted.sparsity
    assert load_masks(tmp_path / "epoch=3-sparsity=0.8.ckpt") == uninterrupted.masks
    later = PruningCallback(schedule=lap_ext.one_shot(0.5, at=30), example_inputs=EXAMPLE)
    with pytest.raises(ValueError, match=r"PruningCallback: .* with the same schedule"):
        trainer_of(later, checkpoints(tmp_path), max_epochs=4).fit(
            copy.deepcopy(start), batches, ckpt_path=second
        )
    again = new()
    trainer = trainer_of(again, checkpoints(tmp_path), max_epochs=4)
    trainer.fit(start, batches, ckpt_path=second)
    cases.check_equal(model, start)
    assert again.masks == uninterrupted.masks and again.result is not None
    assert len(watched(trainer)) == 10
    # a checkpoint that is only looked at comes with its masks, too
    trainer.test(start, batches, ckpt_path=second, verbose=False)
    assert again.masks == saved
    cases.check_zero(start, saved)


def test_further_fit_of_a_trainer_goes_on() -> None:
    """And one of a new trainer starts anew."""

    class Plain(Net):  # every fit makes an optimizer: one that remembers nothing
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), RATE)

    schedule = lap_ext.cubic(0.8, start=1, end=7)
    model, batches = Plain(), Batches(5)
    other, dense = copy.deepcopy(model), copy.deepcopy(model)
    pruning = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
    trainer = trainer_of(pruning)
    trainer.fit(model, batches)
    between = pruning.masks
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches)
    uninterrupted = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
    trainer_of(uninterrupted, max_epochs=2).fit(other, batches)
    assert between.sparsity < 0.8 and pruning.masks == uninterrupted.masks
    trainer.fit_loop.max_epochs = 3
    with pytest.raises(
        ValueError, match=r"got the callback's own, which prunes weights of 'net.co"
    ):
        trainer.fit(copy.deepcopy(dense), batches)
    trainer_of(pruning).fit(dense, batches)
    assert pruning.masks == between


class Search(callbacks.LearningRateFinder):
    """Also before the third epoch; the rate that it finds is not taken."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=3, update_attr=False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


def test_search_for_the_learning_rate(tmp_path: Path) -> None:
    """It trains and goes back, at the start and between epochs: nobody sees it."""
    runs = []
    for search in (False, True):
        torch.manual_seed(0)
        model = Net()
        model.lr = RATE
        pruning = PruningCallback(
            schedule=lap_ext.cubic(0.8, start=0, end=8), example_inputs=EXAMPLE
        )
        given: dict[str, Any] = {"max_epochs": 4, "default_root_dir": tmp_path}
        trainer = trainer_of(pruning, *([Search()] if search else []), **given)
        trainer.fit(model, Batches(5))
        runs.append((model, pruning.masks, watched(trainer)))
        assert pruning.result is not None and pruning.result.masks is pruning.masks
    cases.check_equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_checkpoints_without_masks(tmp_path: Path) -> None:
    schedule = lap_ext.one_shot(0.5, at=3)
    model, batches = Net(), Batches(5)
    file = tmp_path / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    trainer.save_checkpoint(file)
    used = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
    trainer_of(used).fit(Net(), batches)  # what it has left is not of the checkpoint
    with pytest.raises(
        ValueError, match=r"the masks of this callback .* got one of step 5 without"
    ):
        trainer_of(used, max_epochs=2).fit(model, batches, ckpt_path=file)
    with pytest.raises(ValueError, match=r"load_masks: .*last.ckpt' without its state. ModelCheck"):
        load_masks(file)
    masks = lap_ext.prune(model, EXAMPLE, 0.5).masks  # masks go on from any checkpoint
    trainer = trainer_of(PruningCallback(masks), max_epochs=2)
    trainer.fit(model, batches, ckpt_path=file)
    cases.check_zero(model, masks)
    trainer.save_checkpoint(file)
    assert load_masks(file) == masks
    others = cases.random_masks(model, NAMES)  # and those that are given count, not the file's
    pruning = PruningCallback(others)
    trainer_of(pruning, max_epochs=3).fit(model, batches, ckpt_path=file)
    assert pruning.masks == others
    cases.check_zero(model, others)
    torch.save({"callbacks": {STATE_KEY: Watch(used)}}, file)
    with pytest.raises(ValueError, match=r"expected a checkpoint that torch.load reads"):
        load_masks(file)
    with pytest.raises(FileNotFoundError, match=r"^load_masks: .*, got nothing at 'nowhere.ckpt'"):
        load_masks("nowhere.ckpt")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"layers": {}, "masks": 3},
        {"layers": {}, "masks": {"fc": torch.ones(1, dtype=torch.uint8)}},
        {"layers": {"fc": [2**40]}, "masks": {"fc": torch.ones(1, dtype=torch.uint8)}},
        {"layers": {"fc": ["8"]}, "masks": {"fc": torch.ones(1, dtype=torch.uint8)}},
        {"layers": {"fc": [8]}, "masks": {"fc": torch.ones(1)}},
        {"layers": {"fc": [8]}, "masks": {"fc": 1}},
    ],
    ids=str,
)
def test_damaged_masks_in_a_checkpoint(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save({"callbacks": {STATE_KEY: state}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="load_masks: expected an undamaged state of Pruning"):
        load_masks(tmp_path / "last.ckpt")


def test_a_run_with_a_computed_weight_resumes(tmp_path: Path) -> None:
    """Its mask is in the state of the model, which Lightning loads before training starts."""
    schedule = lap_ext.cubic(0.8, start=1, end=9, every=2)
    runs = []
    for start in (None, tmp_path / "half.ckpt"):
        torch.manual_seed(0)
        model = Net()
        torch.nn.utils.parametrizations.weight_norm(model.net.fc1)
        callback = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
        for steps in (5, 10) if start is None else (10,):
            trainer = pl.Trainer(
                max_steps=steps,
                callbacks=[callback],
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
            )
            half = tmp_path / "half.ckpt"
            trainer.fit(model, Batches(5), ckpt_path=half if half.exists() else None)
            if steps == 5:
                trainer.save_checkpoint(half)
        runs.append((callback.masks, model.net.fc1.weight.detach()))
    (masks, weight), (resumed, of_resumed) = runs
    assert resumed == masks and masks.sparsity > 0.75
    assert torch.equal(of_resumed, weight) and torch.equal(weight != 0, masks["net.fc1"])
