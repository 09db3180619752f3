# SPDX-License-Identifier: MIT
"""Lookahead pruning with Lightning's Trainer: a callback that keeps masks, or prunes by a schedule.

    >>> import lap_ext, lightning, torch
    >>> from lap_ext.adapters.lightning import PruningCallback
    >>> class Net(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    ...     def forward(self, x):
    ...         return self.net(x)
    ...     def training_step(self, x):
    ...         return self(x).square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.AdamW(self.parameters())
    >>> pruning = PruningCallback(schedule=lap_ext.cubic(0.75, start=0, end=6, every=2),
    ...                           example_inputs=torch.zeros(1, 4))
    >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
    ...              enable_model_summary=False)
    >>> trainer = lightning.Trainer(max_steps=8, accelerator="cpu", callbacks=[pruning], **quiet)
    >>> trainer.fit(Net(), torch.randn(8, 16, 4))  # a DataLoader, or anything with batches
    >>> pruning.masks.counts(), float(trainer.callback_metrics["sparsity"])
    ({'net.0': (8, 32), 'net.1': (4, 16)}, 0.75)

What each event does:

    setup               refuses strategies that hold parts of parameters: FSDP, DeepSpeed, model
                        parallel
    on_train_start      traces the module, builds `lap_ext.Pruner`; or `Masks.keep` of given masks.
                        A resumed run goes on with the masks of its checkpoint
    every backward      gradients of pruned weights become 0, before they are clipped: pruned
                        weights do not count in the gradient's norm, and are not sent between
                        processes as anything but zeros
    on_train_batch_end  counts the optimizer's steps (`trainer.global_step`), prunes if the schedule
                        says so, logs "sparsity"; ModelCheckpoint comes after it and may monitor it
    state_dict          the masks are in every checkpoint (`load_masks`), but not in those of
                        save_weights_only=True
    on_train_end        ends it; the module is a plain module with zeros

Gradient accumulation, mixed precision, torch.compile, manual optimization with several optimizers
and DistributedDataParallel need nothing else. Averages of the weights (EMAWeightAveraging) that
begin before a pruning need `masks.apply(average)`; if their callback stands before this one, what
they leave in the module at the end is masked. A strategy that spawns its processes (ddp_spawn,
ddp_notebook) leaves the callback of the first process as it was: `load_masks` has the masks.

The callback is one of `lightning`, or of `pytorch_lightning` where that is all there is. A Trainer
of either takes it, in a list of callbacks.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lap_ext
from lap_ext.adapters._callback import TrainingCallback, check_pruned, placed
from lap_ext.masks import pack, unpack

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ModuleNotFoundError(
            "lap_ext.adapters.lightning: expected the lightning package (or pytorch_lightning), got "
            f"none that can be imported ({error}). Run: pip install lightning",
            name="lightning",
        ) from error

STATE_KEY = "lap_ext.PruningCallback"  # in a checkpoint's "callbacks"
_PARTS = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class PruningCallback(TrainingCallback, Callback):
    """Keeps pruned weights at zero while a Trainer trains, and prunes by a schedule.

    Exactly one of masks and schedule. The schedule's step is `trainer.global_step`: a further
    `fit` of the same trainer goes on with it, one of a new trainer starts anew.

    Args:
        masks: of the module that is trained, as `lap_ext.prune` gave them: applied when training
            begins, and kept.
        schedule: optimizer step (from 0) -> the sparsity to prune to, or None; as `lap_ext.Pruner`
            takes it.
        example_inputs: with a schedule, for the trace: what `forward` of the module takes, a tensor
            or tuple of positional inputs, a dict of named ones, or a `Topology`. None: the module's
            example_input_array.
        options: criterion, scope, normalize, order, rounds, exclude, bn, skip, data, kwargs,
            neighbors and unknown, as `lap_ext.Pruner` takes them.

    Attributes:
        masks: the masks so far, `lap_ext.Masks`; of a checkpoint that was loaded, that one's.
        result: the last pruning's `lap_ext.PruneResult`, or None.

    Raises:
        TypeError, ValueError: both or neither of masks and schedule; from the trainer's `fit`: as
            `lap_ext.Pruner` and `lap_ext.Masks.keep`; a strategy that holds parts of parameters;
            the checkpoint has no masks, so that a schedule cannot go on.

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
        **options: Any,
    ) -> None:
        super().__init__(masks, schedule=schedule, example_inputs=example_inputs, **options)
        self._step = 0  # of the pruner
        self._state: dict[str, Any] = {}  # what a fit that is over, or a checkpoint, has left
        self._logged = 0.0  # reading the masks at every batch would wait for the device

    @property
    def state_key(self) -> str:
        """Where a checkpoint has the state."""
        return STATE_KEY

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Every process must have whole parameters."""
        kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        for name in _PARTS:
            if name in kinds:
                raise ValueError(
                    "PruningCallback: expected whole parameters in each process (a single one, or "
                    f"DistributedDataParallel), got {name}. Prune before training, save, and mask "
                    "the parts yourself; or train without it."
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Builds what prunes; a resumed run goes on with its masks."""
        self._end()
        if self._schedule is None:
            self._begin(pl_module, trainer.optimizers, None, {})
        else:
            example = _example(pl_module) if self._example is None else self._example
            inputs, options = placed(example, pl_module, self._options)
            self._begin(trainer.model, trainer.optimizers, inputs, options)
            self._resume(trainer.global_step)
        self._logged = self.sparsity

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prunes if the optimizer has stepped and the schedule says so; logs the sparsity."""
        if self._pruner is not None and self._follow(trainer.global_step):
            self._logged = self.sparsity
        if not trainer.barebones:
            pl_module.log("sparsity", self._logged)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends it."""
        self._end()
        self.masks.apply(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends it where training broke off."""
        self._end()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What an earlier fit has left is not of this checkpoint."""
        self._state = {}

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, or the given masks in the same form: one bit per weight."""
        if self._pruner is not None:
            return self._pruner.state_dict()
        if self._schedule is not None:
            return self._state
        return {
            "step": 0,
            "masks": {name: pack(mask) for name, mask in self.masks.items()},
            "layers": {name: list(mask.shape) for name, mask in self.masks.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint's masks.

        Masks that were given count as they are. So does a training that is under way: a search for
        the learning rate goes back to where it began, and has not pruned.
        """
        if self._schedule is None or self._pruner is not None:
            return
        self.masks, self.result = _unpacked(state_dict), None
        self._state = state_dict

    def _end(self) -> None:
        if self._pruner is not None:
            self._state = self._pruner.state_dict()
        super()._end()

    def _resume(self, step: int) -> None:
        """The pruner goes on at this step: a schedule is a pure function of it."""
        assert self._pruner is not None
        self._step = 0
        if step:
            if not self._state:
                raise ValueError(
                    "PruningCallback: expected a checkpoint with the masks of this callback (the "
                    f"schedule goes on from them), got one of step {step} without. Load its weights "
                    "alone into the module and call fit without ckpt_path: the schedule then starts "
                    "at step 0. Or pass masks."
                )
            masks = _unpacked(self._state)
            cure = "Load the checkpoint with fit(ckpt_path=...), or use a new trainer."
            check_pruned(self._pruner.topology.model, masks, "the callback's own", cure)
            self._pruner.load_state_dict(self._state)
            self._step = self._state["step"]
        self._take()

    def _follow(self, step: int) -> bool:
        """The pruner's steps are the optimizer's; whether it has pruned."""
        assert self._pruner is not None
        pruned = False
        while self._step < step:
            pruned = self._pruner.step() is not None or pruned
            self._step += 1
        if pruned:
            self._take()
        return pruned


def load_masks(checkpoint: str | Path) -> lap_ext.Masks:
    """The masks in a Lightning checkpoint, on the CPU; no pickled code is executed.

    Args:
        checkpoint: the file, trained with a `PruningCallback`.

    Raises:
        ValueError: it has none (save_weights_only=True leaves them out), or torch.load refuses it
            with weights_only=True.

    Example:
        >>> import tempfile, torch
        >>> pruning = PruningCallback({"fc": torch.tensor([[True, False, True]])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = {"callbacks": {pruning.state_key: pruning.state_dict()}}
        ...     torch.save(saved, f"{folder}/last.ckpt")  # ModelCheckpoint does it
        ...     load_masks(f"{folder}/last.ckpt")
        Masks(1 layer, 2 of 3 weights kept, sparsity 0.3333)
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            "load_masks: expected a checkpoint that torch.load reads with weights_only=True, got "
            f"{str(checkpoint)!r}: {str(error).splitlines()[0]}"
        ) from None
    states = saved.get("callbacks") if isinstance(saved, dict) else None
    if not isinstance(states, dict) or STATE_KEY not in states:
        raise ValueError(
            "load_masks: expected a checkpoint of a training with PruningCallback, got "
            f"{str(checkpoint)!r} without its state. ModelCheckpoint(save_weights_only=True) leaves "
            "it out."
        )
    return _unpacked(states[STATE_KEY])


def _unpacked(state: Mapping[str, Any]) -> lap_ext.Masks:
    """The masks of a state."""
    shapes = state["layers"]
    return lap_ext.Masks(
        {name: unpack(x, tuple(shapes[name])) for name, x in state["masks"].items()}
    )


def _example(pl_module: Any) -> Any:
    """What Lightning's own summaries call the module with."""
    inputs = pl_module.example_input_array
    if inputs is None:
        raise TypeError(
            "PruningCallback: expected example_inputs (for the trace), got none, and "
            f"{type(pl_module).__name__} has no example_input_array. Pass a small batch as forward "
            "takes it."
        )
    return inputs
