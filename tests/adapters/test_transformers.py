# SPDX-License-Identifier: MIT
"""PruningCallback in transformers' Trainer, on the CPU; the oracle is the loop written out.

What the oracle knows is that a pruned weight does not exist: not in a step, not in the moments, not
in the gradient's norm by which Trainer clips.
"""

from __future__ import annotations

import copy
import os
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import lap_ext
from tests.helpers import masked_network as cases
from tests.helpers.processes import two_processes

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
transformers = pytest.importorskip("transformers", reason="the framework of this adapter")

import lap_ext.adapters.transformers as adapter  # noqa: E402 (after the skip)
from lap_ext.adapters.transformers import MASKS_NAME, STATE_NAME, PruningCallback  # noqa: E402

RATE = 0.05


class Net(nn.Module):
    """masked_network's network as Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cases.net()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


NAMES = ("net.conv", "net.fc1", "net.fc2")
EXAMPLE = torch.zeros(1, 1, 6, 6)


def dataset(count: int = 48) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(count, 1, 6, 6, generator=generator)
    return [{"x": x, "labels": i % 3} for i, x in enumerate(pictures)]


def arguments(directory: Path, **given: Any) -> Any:
    usual: dict[str, Any] = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(str(directory), **(usual | given))


class Watch(transformers.TrainerCallback):
    """Checks the model after each step: pruned weights are +0.0."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.sparsities: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        cases.check_zero(model, self.pruning.masks)
        self.sparsities.append(round(self.pruning.sparsity, 2))


def trainer(model: nn.Module, args: Any, pruning: PruningCallback, **given: Any) -> Any:
    data = dataset()
    return transformers.Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[pruning, Watch(pruning)],
        **given,
    )


def written_out(
    model: nn.Module, schedule: Any, masks: Any = None, *, accumulate: int = 1
) -> tuple[lap_ext.Masks, list[float]]:
    """Trains in the same way by hand: (masks, norms of the gradients of what is left)."""
    plain = {"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0}
    decayed = {"params": [p for n, p in model.named_parameters() if "bias" not in n]}
    optimizer = torch.optim.AdamW([decayed, plain], RATE, weight_decay=0.1)
    data = dataset()

    def loss(index: int) -> Tensor:
        rows = data[index * 4 % 48 : index * 4 % 48 + 4]
        x, labels = torch.stack([r["x"] for r in rows]), torch.tensor([r["labels"] for r in rows])
        return model(x, labels)["loss"]

    steps = [
        [partial(loss, step * accumulate + batch) for batch in range(accumulate)]
        for step in range(10)
    ]
    return cases.by_hand(model, optimizer, steps, schedule, masks, example=EXAMPLE, clip=0.05)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_kept_masks(tmp_path: Path, accumulate: int) -> None:
    """Bit for bit the loop in which pruned weights do not exist, in the clipped norm neither."""
    model = Net()
    masks = lap_ext.prune(model, EXAMPLE, 0.6).masks
    other = copy.deepcopy(model)
    pruning = PruningCallback(masks)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    run = trainer(model, args, pruning)
    run.train()
    cases.check_zero(model, masks)
    _, norms = written_out(other, lambda step: None, masks, accumulate=accumulate)
    cases.check_equal(model, other)
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["grad_norm"] for log in logs] == pytest.approx(norms, rel=1e-6)
    assert all(log["sparsity"] == masks.sparsity for log in run.state.log_history)
    assert run.evaluate()["eval_loss"] > 0


def test_schedule(tmp_path: Path) -> None:
    """The masks of the schedule's own loop; afterwards neither optimizer nor weights have hooks."""
    model = Net()
    other = copy.deepcopy(model)
    schedule = lap_ext.cubic(0.8, start=1, end=7, every=3)
    pruning = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
    run = trainer(model, arguments(tmp_path), pruning)
    run.train()
    masks, norms = written_out(other, schedule)
    cases.check_equal(model, other)
    assert pruning.masks == masks and pruning.result.masks == masks
    assert [row.name for row in pruning.result.layers] == list(NAMES)
    sparsities = run.callback_handler.callbacks[-2].sparsities
    assert sparsities == [0.0] * 4 + [0.7] * 3 + [0.8] * 3
    logged = [round(log["sparsity"], 2) for log in run.state.log_history if "loss" in log]
    assert logged == sparsities
    inner = run.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    assert len(norms) == 10


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, moved: bool) -> None:
    schedule = lap_ext.cubic(0.8, start=1, end=8)
    model = Net()
    start = copy.deepcopy(model)

    def new(schedule: Any = schedule, **given: Any) -> PruningCallback:
        return PruningCallback(schedule=schedule, example_inputs=EXAMPLE, **given)

    args = arguments(tmp_path / "run", save_strategy="steps", save_steps=5)
    uninterrupted = new()
    trainer(model, args, uninterrupted).train()
    checkpoint = tmp_path / "run" / "checkpoint-5"
    saved = lap_ext.Masks.load(checkpoint / MASKS_NAME)
    assert 0.5 < saved.sparsity < uninterrupted.sparsity
    last = lap_ext.Masks.load(tmp_path / "run" / "checkpoint-10" / MASKS_NAME, model)
    assert last == uninterrupted.masks
    again = new()
    if moved:
        checkpoint = Path(shutil.move(checkpoint, tmp_path / "elsewhere"))
        with pytest.raises(OSError) as caught:
            trainer(copy.deepcopy(start), args, again).train(resume_from_checkpoint=str(checkpoint))
        assert str(caught.value).startswith(
            "PruningCallback: expected masks.safetensors in the checkpoint of step 5 (to continue"
        )
        again = new(resume_from=tmp_path / "run" / "checkpoint-10")
        with pytest.raises(ValueError, match=r"which prunes weights of 'net.conv' that are not"):
            trainer(copy.deepcopy(start), args, again).train(resume_from_checkpoint=str(checkpoint))
        again = new(resume_from=checkpoint)
    else:
        later = lap_ext.cubic(0.8, start=1, end=80)
        for other, text in ((new(later), "the same schedule"), (new(scope="global"), "options")):
            with pytest.raises(ValueError, match=rf"PruningCallback: .* with .*{text}"):
                trainer(copy.deepcopy(start), args, other).train(
                    resume_from_checkpoint=str(checkpoint)
                )
        state = checkpoint / STATE_NAME
        saved_state = state.read_text()
        for damage in ("{", "[]"):
            state.write_text(damage)
            with pytest.raises(ValueError, match=r"PruningCallback: expected an undamaged .*json'"):
                trainer(copy.deepcopy(start), args, new()).train(
                    resume_from_checkpoint=str(checkpoint)
                )
        state.write_text(saved_state)
    run = trainer(start, args, again)
    run.train(resume_from_checkpoint=str(checkpoint))
    cases.check_equal(model, start)
    assert again.masks == uninterrupted.masks
    assert len(run.callback_handler.callbacks[-2].sparsities) == 5


class Average(transformers.TrainerCallback):
    """An average of the weights that its callback copies into the model when training ends."""

    def __init__(self, known: bool) -> None:
        self.known = known

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
        self.average = average if self.known else (average,)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        (self.average if self.known else self.average[0]).update_parameters(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        average = self.average if self.known else self.average[0]
        model.load_state_dict(average.module.state_dict())


@pytest.mark.parametrize("known", [True, False], ids=["AveragedModel", "own"])
@pytest.mark.parametrize("place", [0, None], ids=["before ours", "after ours"])
def test_average_that_is_copied_back(tmp_path: Path, place: int | None, known: bool) -> None:
    """The masks hold wherever the other callback stands, and the order stays as it was."""
    model = Net()
    pruning = PruningCallback(schedule=lap_ext.one_shot(0.7, at=4), example_inputs=EXAMPLE)
    training = trainer(model, arguments(tmp_path, max_steps=6), pruning)
    handler = training.callback_handler
    handler.callbacks.insert(len(handler.callbacks) if place is None else place, Average(known))
    order = list(handler.callbacks)
    context = pytest.warns(UserWarning, match="that another callback has written")
    with context if place is None and not known else nullcontext():
        training.train()
    cases.check_zero(model, pruning.masks)
    assert pruning.masks.check(model) == {} and handler.callbacks == order


def test_best_checkpoint_comes_with_its_masks(tmp_path: Path) -> None:
    """What is loaded at the end may be less sparse than what was trained last."""
    model = Net()
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = arguments(tmp_path, load_best_model_at_end=True, learning_rate=1e-5, **steps)
    # dense it is best; the schedule then prunes all
    schedule = {3: 0.5, 5: 1.0}.get
    pruning = PruningCallback(
        schedule=schedule, example_inputs={"x": EXAMPLE}, criterion="magnitude", min_keep=0
    )
    run = transformers.Trainer(
        model, args, train_dataset=dataset(), eval_dataset=dataset()[:8], callbacks=[pruning]
    )
    run.train()
    step = run.state.best_global_step
    assert pruning.sparsity == {2: 0.0, 4: 0.5, 6: 1.0, 8: 1.0, 10: 1.0}[step]
    file = Path(run.state.best_model_checkpoint) / MASKS_NAME
    assert pruning.masks == lap_ext.Masks.load(file)
    for name, mask in pruning.masks.items():
        assert torch.equal(model.get_parameter(f"{name}.weight") != 0, mask)


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 12, "vocab_size": 13, "max_position_embeddings": 16}


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_models_of_transformers(tmp_path: Path, kind: str) -> None:
    """A real model, pruned to its dummy_inputs' trace, saved and loaded as any other."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    make = getattr(transformers, kind)
    model = make(make.config_class(**SIZES, **ids))
    texts = torch.randint(3, 13, (16, 6))
    causal = kind.endswith("CausalLM")
    data = [{"input_ids": x, "labels": x if causal else i % 2} for i, x in enumerate(texts)]
    pruning = PruningCallback(
        schedule=lap_ext.one_shot(0.7, at=2), scope="global", normalize="lamp", exclude="*embed*"
    )
    args = arguments(tmp_path, save_strategy="steps", bf16=True)
    run = transformers.Trainer(
        model, args, train_dataset=data, eval_dataset=data, callbacks=[pruning, Watch(pruning)]
    )
    run.train()
    assert pruning.sparsity == pytest.approx(0.7, abs=1e-3)
    assert run.evaluate()["eval_loss"] > 0
    loaded = make.from_pretrained(tmp_path / "checkpoint-10")
    masks = lap_ext.Masks.load(tmp_path / "checkpoint-10" / MASKS_NAME, loaded)
    cases.check_zero(loaded, masks)
    assert masks == pruning.masks


@pytest.mark.parametrize("example", ["tensor", "tuple", "named"])
def test_inputs_without_a_cache(example: str) -> None:
    """Positional inputs of a model with a cache become named ones, beside use_cache=False."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **ids))
    x = torch.tensor([[3, 4]])
    given: Any = {"tensor": x, "tuple": (x, torch.ones(1, 2)), "named": {"input_ids": x}}[example]
    inputs = adapter.inputs_of(model, given)
    assert inputs["use_cache"] is False and inputs["input_ids"] is x
    assert ("attention_mask" in inputs) == (example == "tuple")
    assert adapter.inputs_of(Net(), given) is not None


def test_refused(tmp_path: Path) -> None:
    masks = {"net.conv": torch.ones(4, 1, 3, 3) == 1}
    schedule = lap_ext.one_shot(0.5)
    for given, text in (
        (
            {},
            "expected either masks (kept as they are) or schedule (step -> sparsity), got neither",
        ),
        ({"masks": masks, "schedule": schedule}, "got both. To prune before training call"),
        (
            {"masks": masks, "criterion": "magnitude"},
            "expected masks alone (nothing is scored), got",
        ),
    ):
        with pytest.raises(TypeError) as caught:
            PruningCallback(**given)
        assert str(caught.value).startswith("PruningCallback: ") and text in str(caught.value)
    model, args = Net(), arguments(tmp_path)
    with pytest.raises(TypeError, match=r"Net has no dummy_inputs. Pass a small batch without"):
        trainer(model, args, PruningCallback(schedule=schedule)).train()
    with pytest.raises(ValueError, match="the model has no such parameter"):
        trainer(model, args, PruningCallback({"conv": masks["net.conv"]})).train()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsity'"):
        PruningCallback(schedule=schedule, example_inputs=EXAMPLE, sparsity=0.5)
    with pytest.raises(TypeError, match=r"PruningCallback: expected topology alone .*got example"):
        both = {"example_inputs": EXAMPLE, "topology": lap_ext.trace(model, EXAMPLE)}
        trainer(model, args, PruningCallback(schedule=schedule, **both)).train()
    args.fsdp = "full_shard"
    with pytest.raises(ValueError, match="expected whole parameters in each process"):
        PruningCallback(masks).on_train_begin(args, None, None, model=model, optimizer=None)


def worker(rank: int, directory: str) -> None:
    """One of two processes, each with its own half of the data."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # required, not used
    torch.manual_seed(0)
    model = Net()
    schedule = lap_ext.cubic(0.8, start=1, end=7, every=3)
    pruning = PruningCallback(schedule=schedule, example_inputs=EXAMPLE)
    args = arguments(Path(directory), save_strategy="steps", save_steps=5, ddp_backend="gloo")
    assert args.world_size == 2
    run = trainer(model, args, pruning)
    run.train()
    assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
    tensors = [*model.parameters(), *(mask.float() for mask in pruning.masks.values())]
    mine = torch.cat([x.detach().flatten() for x in tensors])
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both) and pruning.sparsity > 0.79
    with pytest.raises(
        RuntimeError, match=r"got others for odd \(running statistics of batch norms"
    ):
        adapter._check_agreed(
            lap_ext.Masks({"even": torch.tensor([True]), "odd": torch.tensor([rank == 0])})
        )


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, on this machine only."""
    two_processes(worker, tmp_path)
    masks = lap_ext.Masks.load(tmp_path / "checkpoint-10" / MASKS_NAME)
    assert masks.sparsity > 0.79
