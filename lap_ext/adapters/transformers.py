# SPDX-License-Identifier: MIT
"""Lookahead pruning with transformers' Trainer: a callback that keeps masks, or prunes by a schedule.

    >>> import lap_ext, tempfile, torch, transformers
    >>> from lap_ext.adapters.transformers import PruningCallback
    >>> ids = dict(vocab_size=9, bos_token_id=1, eos_token_id=2)
    >>> config = transformers.GPT2Config(**ids, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    >>> model, folder = transformers.GPT2LMHeadModel(config), tempfile.TemporaryDirectory()
    >>> texts = [{"input_ids": x, "labels": x} for x in torch.randint(9, (16, 6))]
    >>> pruning = PruningCallback(schedule=lap_ext.cubic(0.5, start=0, end=4, every=2))
    >>> args = transformers.TrainingArguments(folder.name, max_steps=8, logging_steps=4,
    ...                                       use_cpu=True, report_to="none", disable_tqdm=True)
    >>> _ = transformers.Trainer(model, args, train_dataset=texts, callbacks=[pruning]).train()
    {'loss': ... 'sparsity': '0.4369'}
    {'loss': ... 'sparsity': '0.5'}
    {'train_runtime': ... 'sparsity': '0.5'}
    >>> pruning.masks.counts()["transformer.h.0.mlp.c_fc"]
    (128, 256)
    >>> folder.cleanup()

What each event does:

    on_train_begin      traces the model, builds `lap_ext.Pruner`; or `Masks.keep` of given masks.
                        A resumed run goes on with the masks of its checkpoint
    every backward      gradients of pruned weights become 0, before they are clipped: pruned
                        weights do not count in the gradient's norm, and are not sent between
                        processes as anything but zeros
    on_optimizer_step   counts the step and prunes if the schedule says so
    on_log              adds "sparsity". Reporters (TensorBoard, ...) that stand before this callback
                        have read their logs by then: `trainer.callback_handler.callbacks.insert(0,
                        pruning)` puts it first
    on_save             writes masks.safetensors into the checkpoint's folder (`lap_ext.Masks.load`)
    on_train_end        ends it; the model is a plain model with zeros

The optimizer that a callback is given is accelerate's wrapper, whose own hooks never run: the one
inside has ours. Gradient accumulation, mixed precision, torch.compile and DistributedDataParallel
need nothing else. FSDP and DeepSpeed, which hold parts of parameters, are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lap_ext
from lap_ext.adapters._callback import TrainingCallback, check_pruned, placed

try:
    from transformers import PreTrainedModel, TrainerCallback
except ImportError as error:
    raise ModuleNotFoundError(
        "lap_ext.adapters.transformers: expected the transformers package (5 or later), got "
        f"none that can be imported ({error}). Run: pip install transformers accelerate",
        name="transformers",
    ) from error
if not hasattr(TrainerCallback, "on_optimizer_step"):
    raise ImportError(
        "lap_ext.adapters.transformers: expected transformers 5 or later (its callbacks have "
        "on_optimizer_step), got an older one. Run: pip install -U transformers"
    )

MASKS_NAME = "masks.safetensors"  # in a checkpoint's folder


class PruningCallback(TrainingCallback, TrainerCallback):
    """Keeps pruned weights at zero while a Trainer trains, and prunes by a schedule.

    Exactly one of masks and schedule. A further `train()` of the same trainer starts the schedule
    anew.

    Args:
        masks: of the model that is trained, as `lap_ext.prune` gave them: applied when training
            begins, and kept.
        schedule: optimizer step (from 0) -> the sparsity to prune to, or None; as `lap_ext.Pruner`
            takes it.
        example_inputs: with a schedule, for the trace: named inputs as the model's tokenizer or
            processor gives them (without labels), or a tensor or tuple of positional ones, or a
            `Topology`. None: the model's dummy_inputs.
        resume_from: the folder that `train(resume_from_checkpoint=...)` is given. Needed only where
            it is not in the trainer's output folder and TrainingArguments does not name it.
        options: criterion, scope, normalize, order, rounds, exclude, bn, skip, data, kwargs,
            neighbors and unknown, as `lap_ext.Pruner` takes them.

    Attributes:
        masks: the masks so far, `lap_ext.Masks`.
        result: the last pruning's `lap_ext.PruneResult`, or None.

    Raises:
        TypeError, ValueError: both or neither of masks and schedule; from the trainer's `train`:
            as `lap_ext.Pruner` and `lap_ext.Masks.keep`.
        FileNotFoundError: from `train`: the checkpoint has no masks, so that a schedule cannot go on.

    Example:
        >>> import torch
        >>> PruningCallback({"classifier": torch.tensor([[True, False]])})
        PruningCallback(Masks(1 layer, 1 of 2 weights kept, sparsity 0.5))
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        *,
        schedule: Any = None,
        example_inputs: Any = None,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(masks, schedule=schedule, example_inputs=example_inputs, **options)
        self._resume_from = resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Builds what prunes; a resumed run gets the masks of its checkpoint."""
        self._end()
        _check_whole(args)
        model, optimizer = kwargs["model"], _innermost(kwargs["optimizer"])
        inputs: Any = None
        options: dict[str, Any] = {}
        if self._schedule is not None:
            inputs, options = call_of("PruningCallback", model, self._example, self._options)
        self._begin(model, [optimizer], inputs, options)
        if self._pruner is not None:
            if state.global_step:
                self._resume(self._pruner, args, state)
            self._take()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prunes if the schedule says so."""
        if self._pruner is not None and self._pruner.step() is not None:
            if args.world_size > 1:
                _check_agreed(self._pruner.masks)
            self._take()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the sparsity, also to what trainer_state.json will hold."""
        if logs is not None and (self._hooks or self.masks):
            logs["sparsity"] = self.sparsity
            if state.log_history:
                state.log_history[-1]["sparsity"] = self.sparsity

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stores the masks beside the checkpoint.

        The trials of a hyperparameter search have folders of their own and get no file.
        """
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            self.masks.save(folder / MASKS_NAME)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends it; if the trainer has loaded its best checkpoint, with that one's masks."""
        self._end()
        model = kwargs["model"]
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and (Path(best) / MASKS_NAME).exists():
            self.masks = lap_ext.Masks.load(Path(best) / MASKS_NAME, model)
        self.masks.apply(model)

    def _resume(self, pruner: lap_ext.Pruner, args: Any, state: Any) -> None:
        """Goes on where the checkpoint was written: a schedule is a pure function of the step."""
        from safetensors.torch import load_file

        folders = [self._resume_from, args.resume_from_checkpoint, _checkpoint(args, state)]
        files = [Path(x) / MASKS_NAME for x in folders if x and not isinstance(x, bool)]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise FileNotFoundError(
                f"PruningCallback: expected {MASKS_NAME} in the checkpoint of step "
                f"{state.global_step} (the schedule goes on from these masks), got none in "
                f"{', '.join(str(file.parent) for file in files)}. Pass resume_from=<the folder of "
                "the checkpoint>."
            )
        model = pruner.topology.model
        masks = lap_ext.Masks.load(file, model)
        cure = "Pass resume_from=<the folder of the checkpoint>."
        check_pruned(model, masks, repr(str(file)), cure)
        bits = load_file(file)  # one bit per weight, as in the pruner's state
        pruner.load_state_dict({**pruner.state_dict(), "step": state.global_step, "masks": bits})


def _innermost(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrappers: the hooks of those never run."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _check_whole(args: Any) -> None:
    """Every process has whole parameters."""
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise ValueError(
                "PruningCallback: expected whole parameters in each process (a single one, "
                f"DataParallel or DistributedDataParallel), got {name}. Prune before training, save, "
                "and mask the parts yourself; or train without it."
            )


def _check_agreed(masks: lap_ext.Masks) -> None:
    """Every process has found the same masks as the first one; if not, all of them raise."""
    differ: list[Tensor] = []
    for mask in masks.values():
        first = mask.to(torch.uint8)
        torch.distributed.broadcast(first, src=0)
        differ.append((first.bool() != mask).any())
    found = torch.stack(differ).to(torch.uint8)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    names = [name for name, differs in zip(masks, found.tolist(), strict=True) if differs]
    if names:
        raise RuntimeError(
            "PruningCallback: expected every process to find the same masks, got others for "
            f"{', '.join(names[:5])} (running statistics of batch norms, and data, differ between "
            'processes). Use bn="off" or the same data, or prune before training and pass masks.'
        )


def call_of(
    function: str, model: Any, example: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(inputs, options) for the trace of a model: dummy_inputs if need be, no cache, on its device.

    Args:
        function: whom the error message names.
        model: of transformers, or any other if there is an example.
        example: positional inputs, named ones, a `Topology` or None.
        options: of `lap_ext.trace`; kwargs of them come before what is found here.

    Raises:
        TypeError: there is neither an example nor dummy_inputs.
    """
    if example is None:
        example = getattr(model, "dummy_inputs", None)
    if example is None:
        raise TypeError(
            f"{function}: expected example_inputs (for the trace), got none, and "
            f"{type(model).__name__} has no dummy_inputs. Pass a small batch without labels."
        )
    inputs, options = placed(example, model, options)
    if isinstance(model, PreTrainedModel) and not isinstance(example, lap_ext.Topology):
        if "use_cache" in inspect.signature(model.forward).parameters:
            # a cache is an object that torch.export refuses
            options["kwargs"] = {"use_cache": False, **options.get("kwargs", {})}
    return inputs, options


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
