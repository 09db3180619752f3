# SPDX-License-Identifier: MIT
"""Prunes with transformers' Trainer: a callback keeps masks or prunes by a schedule.

    >>> import lap_ext, tempfile, torch, transformers
    >>> from lap_ext.adapters.transformers import PruningCallback
    >>> ids = dict(vocab_size=9, bos_token_id=1, eos_token_id=2)
    >>> config = transformers.GPT2Config(**ids, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    >>> model, directory = transformers.GPT2LMHeadModel(config), tempfile.TemporaryDirectory()
    >>> texts = [{"input_ids": x, "labels": x} for x in torch.randint(9, (16, 6))]
    >>> pruning = PruningCallback(schedule=lap_ext.cubic(0.5, start=0, end=4, every=2))
    >>> args = transformers.TrainingArguments(directory.name, max_steps=8, logging_steps=4,
    ...                                       use_cpu=True, report_to="none", disable_tqdm=True)
    >>> _ = transformers.Trainer(model, args, train_dataset=texts, callbacks=[pruning]).train()
    {'loss': ... 'sparsity': '0.4375'}
    {'loss': ... 'sparsity': '0.5'}
    {'train_runtime': ... 'sparsity': '0.5'}
    >>> pruning.masks.counts()["transformer.h.0.mlp.c_fc"]
    (128, 256)
    >>> directory.cleanup()

What each event does:

    on_train_begin      traces the model and builds `lap_ext.Pruner`, or calls `Masks.keep` of the
                        given masks. A resumed run continues with the masks of its checkpoint
    every backward      sets gradients of pruned weights to 0 before they are averaged or clipped:
                        pruned weights do not count in the gradient's norm
    on_optimizer_step   counts the step and prunes if the schedule says so
    on_log              adds "sparsity". Reporters (TensorBoard, ...) that precede this callback
                        have already read the logs by then, so put this callback first with
                        `trainer.callback_handler.callbacks.insert(0, pruning)`
    on_save             writes masks.safetensors into the checkpoint directory; `lap_ext.Masks.load`
                        reads it. With a schedule also pruning.json, the options and the prunings so
                        far, which those of a resumed run must match; remove it to continue by
                        another schedule on purpose
    on_train_end        removes all hooks; the model is a plain model with zeros, also where a later
                        callback has copied an average of the weights into it

transformers passes accelerate's wrapper of the optimizer to callbacks. Hooks on the wrapper never
run, so the hooks are placed on the optimizer inside. Gradient accumulation, mixed precision,
torch.compile and DistributedDataParallel need no setup. An AveragedModel in another callback is
masked at each pruning. FSDP and DeepSpeed, which shard parameters,
are rejected.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import lap_ext
from lap_ext.adapters._callback import TrainingCallback, check_pruned, on_device
from lap_ext.allocation import Sparsity
from lap_ext.criteria import CriterionLike
from lap_ext.errors import (
    LapFileNotFoundError,
    LapImportError,
    LapRuntimeError,
    LapTypeError,
    LapValueError,
    calling,
)
from lap_ext.masks import pack
from lap_ext.options import (
    BatchNorm,
    Cost,
    Data,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Residual,
    Scope,
)
from lap_ext.progress import Progress
from lap_ext.structures import Aggregate, StructureLike

with calling("lap_ext.adapters.transformers"):
    try:
        from transformers import PreTrainedModel, TrainerCallback
    except ImportError as error:
        raise LapImportError(
            "the transformers package (5 or later)",
            f"none that can be imported ({error})",
            "Run: pip install transformers accelerate",
            name="transformers",
        ) from error
    if not hasattr(TrainerCallback, "on_optimizer_step"):
        raise LapImportError(
            "transformers 5 or later (its callbacks have on_optimizer_step)",
            "an older one",
            "Run: pip install -U transformers",
            name="transformers",
        )
    from transformers.trainer_callback import CallbackHandler

MASKS_NAME = "masks.safetensors"  # in a checkpoint directory
STATE_NAME = "pruning.json"  # beside the masks
_FACTS = ("options", "prunings")  # of the pruner's state


class PruningCallback(TrainingCallback, TrainerCallback):
    """Keeps pruned weights at zero while a Trainer trains, and prunes by a schedule if given one.

    Pass exactly one of masks and schedule. Another `train()` of the same trainer starts the
    schedule anew. All other arguments apply only to a schedule.

    Args:
        masks: the masks of the model that is trained, from `lap_ext.prune`. They are applied when
            training begins, and kept during training.
        schedule: a function from the optimizer step (from 0) to the sparsity to prune to, or to
            None, as in `lap_ext.Pruner`.
        example_inputs: as in `lap_ext.prune`; named inputs are what the model's tokenizer or
            processor returns (without labels). With None, the model's dummy_inputs are used.
        resume_from: the checkpoint directory that is passed to `train(resume_from_checkpoint=...)`.
            Needed only if that directory is neither in the trainer's output directory nor named in
            TrainingArguments.
        topology: as in `lap_ext.prune`.
        criterion: as in `lap_ext.prune`.
        structure: as in `lap_ext.prune`, on the way to N:M as in `lap_ext.Pruner`.
        aggregate: as in `lap_ext.prune`.
        multiple_of: as in `lap_ext.prune`.
        strict: as in `lap_ext.prune`.
        cost: as in `lap_ext.prune`.
        uniform: as in `lap_ext.prune`.
        scope: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        order: as in `lap_ext.prune`.
        rounds: as in `lap_ext.prune`, for each pruning.
        layers: as in `lap_ext.prune`.
        exclude: as in `lap_ext.prune`.
        min_keep: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        data: as in `lap_ext.prune`; it is read at every pruning, so an iterator is not enough.
        neighbors: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        on_progress: as in `lap_ext.prune`.

    Attributes:
        masks: the current `lap_ext.Masks`.
        result: the last pruning's `lap_ext.PruneResult`, or None.

    Raises:
        TypeError: both or neither of masks and schedule are given, or masks with options of a
            schedule. The trainer's `train` raises it as in `lap_ext.Pruner` and
            `lap_ext.Masks.keep`.
        ValueError: raised by `train` as in `lap_ext.Pruner` and `lap_ext.Masks.keep`; also if FSDP
            or DeepSpeed is used, or if the checkpoint is of another schedule or other options.
        OSError: raised by `train` if a schedule cannot continue because the checkpoint has no
            masks.

    Example:
        >>> import torch
        >>> PruningCallback({"classifier": torch.tensor([[True, False]])})
        PruningCallback(Masks(1 layer, 1 of 2 weights kept, sparsity 0.5))
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        *,
        schedule: Callable[[int], Sparsity | None] | None = None,
        example_inputs: Inputs | None = None,
        resume_from: str | Path | None = None,
        topology: lap_ext.Topology | None = None,
        criterion: CriterionLike = "lookahead",
        structure: StructureLike | None = None,
        aggregate: Aggregate = "energy",
        multiple_of: int = 1,
        strict: bool = False,
        cost: Cost | None = None,
        uniform: bool = False,
        scope: Scope = "layer",
        normalize: Normalize = "auto",
        order: Order = "parallel",
        rounds: int = 1,
        layers: Patterns | None = None,
        exclude: Patterns = (),
        min_keep: MinKeep = None,
        batch_norm: BatchNorm = "edge",
        residual: Residual = "sum",
        data: Data | None = None,
        neighbors: Mapping[str, Any] | None = None,
        on_unsupported: OnUnsupported = "raise",
        on_progress: Callable[[Progress], Any] | None = None,
    ) -> None:
        super().__init__(
            masks,
            schedule=schedule,
            example_inputs=example_inputs,
            topology=topology,
            criterion=criterion,
            structure=structure,
            aggregate=aggregate,
            multiple_of=multiple_of,
            strict=strict,
            cost=cost,
            uniform=uniform,
            scope=scope,
            normalize=normalize,
            order=order,
            rounds=rounds,
            layers=layers,
            exclude=exclude,
            min_keep=min_keep,
            batch_norm=batch_norm,
            residual=residual,
            data=data,
            neighbors=neighbors,
            on_unsupported=on_unsupported,
            on_progress=on_progress,
        )
        self._resume_from = resume_from
        self._handler: CallbackHandler | None = None  # of the training

    @calling("PruningCallback")
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the masks or builds the pruner; a resumed run gets the masks of its checkpoint."""
        self._end()
        _check_not_sharded(args)
        self._begin(kwargs["model"], [_innermost(kwargs["optimizer"])])
        if self._pruner is not None:
            if state.global_step:
                self._resume(self._pruner, args, state)
            self._take()
        self._handler = _caller()
        self._mask_averages(self._others())

    @calling("PruningCallback")
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prunes if the schedule says so."""
        if self._pruner is not None and self._pruner.step() is not None:
            if args.world_size > 1:
                _check_agreed(self._pruner.masks)
            self._take()
            self._mask_averages(self._others())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the sparsity to the logs and to the history that trainer_state.json will hold."""
        if logs is not None and (self._hooks or self.masks):
            logs["sparsity"] = self.sparsity
            if state.log_history:
                state.log_history[-1]["sparsity"] = self.sparsity

    @calling("PruningCallback")
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the masks, and what a schedule has done, into the checkpoint directory.

        No file is written for the trials of a hyperparameter search: their checkpoints are in
        other directories.
        """
        directory = _checkpoint(args, state)
        if state.is_world_process_zero and directory.is_dir():
            self.masks.save(directory / MASKS_NAME)
            if self._pruner is not None:
                saved = self._pruner.state_dict()
                facts = {name: saved[name] for name in _FACTS}
                (directory / STATE_NAME).write_text(json.dumps(facts))

    @calling("PruningCallback")
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes all hooks; takes the best checkpoint's masks if the trainer has loaded it.

        Looks at the masks once more after all other callbacks, which may write weights too.
        """
        self._end()
        model = kwargs["model"]
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and (Path(best) / MASKS_NAME).exists():
            self.masks = lap_ext.Masks.load(Path(best) / MASKS_NAME, model)
        self._apply(model)
        if self._handler is not None:
            _Last(self, self._handler)
        self._handler = None

    def _others(self) -> list[Any]:
        """Lists all callbacks of the training."""
        return [] if self._handler is None else self._handler.callbacks

    def _inputs(self, model: Any) -> Inputs:
        return inputs_of(model, self._example)

    def _resume(self, pruner: lap_ext.Pruner, args: Any, state: Any) -> None:
        """Continues where the checkpoint was written: a schedule is a pure function of the step."""
        directories = [self._resume_from, args.resume_from_checkpoint, _checkpoint(args, state)]
        files = [Path(x) / MASKS_NAME for x in directories if x and not isinstance(x, bool)]
        file = next((file for file in files if file.exists()), None)
        cure = "Pass resume_from=<the checkpoint directory>."
        if file is None:
            raise LapFileNotFoundError(
                f"{MASKS_NAME} in the checkpoint of step {state.global_step} (to continue the "
                "schedule from)",
                f"none in {', '.join(str(file.parent) for file in files)}",
                cure,
            )
        model = pruner.topology.model
        masks = lap_ext.Masks.load(file, model)
        check_pruned(model, masks, repr(str(file)), cure)
        saved = {
            "step": state.global_step,
            "masks": {name: pack(mask) for name, mask in masks.items()},
            "structure": masks.structure,
            "layers": pruner.state_dict()["layers"],
        }
        pruner.load_state_dict(saved | _facts(file.with_name(STATE_NAME)))


class _Last(TrainerCallback):
    """Stands behind all callbacks while training ends: transformers' loop over them sees it."""

    def __init__(self, pruning: PruningCallback, handler: CallbackHandler) -> None:
        self._pruning, self._handler = pruning, handler
        handler.callbacks.append(self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the masks, and leaves the list as it was."""
        self._handler.callbacks = [x for x in self._handler.callbacks if x is not self]
        self._pruning._finish(kwargs["model"])


def _caller() -> CallbackHandler | None:
    """Finds who calls the callbacks, in the calls that led here: no event has a reference to it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def _facts(path: Path) -> dict[str, Any]:
    """Reads the options and prunings of a checkpoint; what is not there is not compared."""
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text())
        return {name: facts[name] for name in _FACTS}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LapValueError(
            f"an undamaged {str(path)!r}", f"{type(error).__name__}: {error}"
        ) from None


def _innermost(optimizer: Any) -> Any:
    """Returns the torch optimizer inside accelerate's wrappers, whose own hooks never run."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _check_not_sharded(args: Any) -> None:
    """Checks that every process has whole parameters."""
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise LapValueError(
                "whole parameters in each process (a single one, DataParallel or "
                "DistributedDataParallel)",
                name,
                "Prune before training, save, and mask the shards yourself; or train without "
                "sharding.",
            )


def _check_agreed(masks: lap_ext.Masks) -> None:
    """Checks that every process has the masks of the first one; if not, all of them raise."""
    differ: list[Tensor] = []
    for mask in masks.values():
        first = mask.to(torch.uint8)
        torch.distributed.broadcast(first, src=0)
        differ.append((first.bool() != mask).any())
    anywhere = torch.stack(differ).to(torch.uint8)
    torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
    names = [name for name, differs in zip(masks, anywhere.tolist(), strict=True) if differs]
    if names:
        raise LapRuntimeError(
            "every process to find the same masks",
            f"others for {', '.join(names[:5])} (running statistics of batch norms, and data, "
            "differ between processes)",
            'Use batch_norm="ignore" or the same data, or prune before training and pass masks.',
        )


def inputs_of(model: Any, example: Inputs | None) -> Inputs:
    """Returns inputs to trace a model with, without cache and on the model's device.

    Args:
        model: a model of transformers, or any other if there is an example.
        example: positional inputs or named inputs; None for the model's dummy_inputs.

    Raises:
        TypeError: example is None and the model has no dummy_inputs.
    """
    if example is None:
        example = getattr(model, "dummy_inputs", None)
    if example is None:
        raise LapTypeError(
            "{argument} (for the trace)",
            f"none, and {type(model).__name__} has no dummy_inputs",
            "Pass a small batch without labels.",
            argument="example_inputs",
        )
    inputs: Inputs = on_device(example, next(model.parameters()).device)
    signature = inspect.signature(model.forward)
    if isinstance(model, PreTrainedModel) and "use_cache" in signature.parameters:
        if not isinstance(inputs, Mapping):
            positional = inputs if isinstance(inputs, tuple) else (inputs,)
            inputs = signature.bind(*positional).arguments
        inputs = {"use_cache": False, **inputs}  # a cache is an object that torch.export rejects
    return inputs


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
