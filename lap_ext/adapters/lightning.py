# SPDX-License-Identifier: MIT
"""Prunes with Lightning's Trainer: a callback keeps masks or prunes by a schedule.

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

    setup               rejects strategies that shard parameters: FSDP, DeepSpeed, model parallel
    on_train_start      traces the module and builds `lap_ext.Pruner`, or calls `Masks.keep` of the
                        given masks. A resumed run continues with the masks of its checkpoint
    every backward      sets gradients of pruned weights to 0 before they are averaged or clipped:
                        pruned weights do not count in the gradient's norm
    on_train_batch_end  counts the optimizer's steps (`trainer.global_step`), prunes if the schedule
                        says so, logs "sparsity"; ModelCheckpoint runs later and may monitor it
    state_dict          puts the masks into every checkpoint (`load_masks` reads them), except those
                        of save_weights_only=True
    on_train_end        removes all hooks; the module is a plain module with zeros
    on_fit_end          the same again, should another callback have written weights meanwhile

Gradient accumulation, mixed precision, torch.compile, manual optimization with several optimizers
and DistributedDataParallel need no setup. Averages of the weights in other callbacks, before or
after this one (EMAWeightAveraging, StochasticWeightAveraging, any AveragedModel of the module), are
masked at each pruning: what they validate, save and leave in the module has zeros. A strategy that
spawns its processes (ddp_spawn, ddp_notebook) does not change the callback of the main process:
read the masks with `load_masks`.

The callback derives from `lightning`, or from `pytorch_lightning` if only that is installed. The
Trainer of either package accepts it, in a list of callbacks.
"""

from __future__ import annotations

import errno
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lap_ext
from lap_ext.adapters._callback import TrainingCallback, check_pruned, on_device
from lap_ext.computed import reserve_masks
from lap_ext.errors import (
    LapFileNotFoundError,
    LapImportError,
    LapTypeError,
    LapValueError,
    calling,
)
from lap_ext.masks import pack, unpack
from lap_ext.options import Inputs

with calling("lap_ext.adapters.lightning"):
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback  # type: ignore[assignment]
        except ImportError as error:
            raise LapImportError(
                "the lightning package (or pytorch_lightning)",
                f"none that can be imported ({error})",
                "Run: pip install lightning",
                name="lightning",
            ) from error

STATE_KEY = "lap_ext.PruningCallback"  # in a checkpoint's "callbacks"
_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class PruningCallback(TrainingCallback, Callback):
    """Keeps pruned weights at zero while a Trainer trains, and prunes by a schedule if given one.

    Pass exactly one of masks and schedule. The schedule's step is `trainer.global_step`:
    another `fit` of the same trainer continues the schedule, and `fit` of a new trainer starts it
    anew. All other arguments apply only to a schedule.

    Args:
        masks: the masks of the module that is trained, from `lap_ext.prune`. They are applied when
            training begins, and kept during training.
        schedule: a function from the optimizer step (from 0) to the sparsity to prune to, or to
            None, as in `lap_ext.Pruner`.
        example_inputs: as in `lap_ext.prune`. With None, the module's example_input_array is used.
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
        masks: the current `lap_ext.Masks`; after a checkpoint is loaded, those of the checkpoint.
        result: the last pruning's `lap_ext.PruneResult`, or None.

    Raises:
        TypeError: both or neither of masks and schedule are given, or masks with options of a
            schedule. The trainer's `fit` raises it as in `lap_ext.Pruner` and `lap_ext.Masks.keep`.
        ValueError: raised by `fit` as in `lap_ext.Pruner` and `lap_ext.Masks.keep`; also if the
            strategy shards parameters, or if a schedule cannot continue because the checkpoint has
            no masks, or is of another schedule or other options.

    Example:
        >>> import torch
        >>> PruningCallback({"classifier": torch.tensor([[True, False]])})
        PruningCallback(Masks(1 layer, 1 of 2 weights kept, sparsity 0.5))
    """

    _step = 0  # of the pruner
    _state: dict[str, Any] | None = None  # from a finished fit or a checkpoint
    _logged = 0.0  # the sparsity: reading the masks at every batch would wait for the device

    @property
    def state_key(self) -> str:
        """The key under which a checkpoint holds the state."""
        return STATE_KEY

    @calling("PruningCallback")
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks that every process holds complete parameters; prepares the model for its state."""
        kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        for name in _SHARDING:
            if name in kinds:
                raise LapValueError(
                    "whole parameters in each process (a single one, or DistributedDataParallel)",
                    name,
                    "Prune before training, save, and mask the shards yourself; or train without "
                    "sharding.",
                )
        reserve_masks(pl_module)  # Lightning loads a checkpoint next

    @calling("PruningCallback")
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the masks, or builds the pruner; a resumed run continues with its masks."""
        self._end()
        self._begin(pl_module, trainer.optimizers, trainer.model)
        if self._pruner is not None:
            self._resume(self._pruner, trainer.global_step)
        self._mask_averages(trainer.callbacks)
        self._logged = self.sparsity

    @calling("PruningCallback")
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prunes if the optimizer has stepped and the schedule says so; logs the sparsity."""
        if self._pruner is not None and self._follow(trainer.global_step):
            self._mask_averages(trainer.callbacks)
            self._logged = self.sparsity
        if not trainer.barebones:
            pl_module.log("sparsity", self._logged)

    @calling("PruningCallback")
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Removes all hooks and applies the masks once more."""
        self._end()
        self._apply(pl_module)

    @calling("PruningCallback")
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Looks at the masks once more, because other callbacks may write weights after this one.

        As one that copies an average of the weights into the module when training ends.
        """
        self._finish(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Removes all hooks after an error."""
        self._end()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Forgets the state of an earlier fit, because it does not belong to the checkpoint."""
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the pruner's state, or the given masks in the same form (one bit per weight)."""
        if self._pruner is not None:
            return self._pruner.state_dict()
        if self._schedule is not None:
            return self._state or {}
        return {
            "step": 0,
            "masks": {name: pack(mask) for name, mask in self.masks.items()},
            "layers": {name: list(mask.shape) for name, mask in self.masks.items()},
            "structure": self.masks.structure,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint's masks.

        Does nothing if masks were given, or during training: a learning-rate search, which reloads
        the state that it began with, has not pruned.
        """
        if self._schedule is None or self._pruner is not None:
            return
        self.masks, self.result = _unpacked(state_dict), None
        self._state = state_dict

    def _end(self) -> None:
        if self._pruner is not None:
            self._state = self._pruner.state_dict()
        super()._end()

    def _inputs(self, model: Any) -> Inputs:
        inputs = _own_example(model) if self._example is None else self._example
        moved: Inputs = on_device(inputs, next(model.parameters()).device)
        return moved

    def _resume(self, pruner: lap_ext.Pruner, step: int) -> None:
        """Continues the pruner at a step: a schedule is a pure function of the step."""
        self._step = 0
        if step:
            if not self._state:
                raise LapValueError(
                    "a checkpoint with the masks of this callback (to continue the schedule from)",
                    f"one of step {step} without",
                    "Load its weights alone into the module and call fit without ckpt_path: the "
                    "schedule then starts at step 0. Or pass masks.",
                )
            masks = _unpacked(self._state)
            cure = "Load the checkpoint with fit(ckpt_path=...), or use a new trainer."
            check_pruned(pruner.topology.model, masks, "the callback's own", cure)
            pruner.load_state_dict(self._state)
            self._step = self._state["step"]
        self._take()

    def _follow(self, step: int) -> bool:
        """Advances the pruner to the optimizer's step; returns whether it has pruned."""
        assert self._pruner is not None
        pruned = False
        while self._step < step:
            pruned = self._pruner.step() is not None or pruned
            self._step += 1
        if pruned:
            self._take()
        return pruned


@calling("load_masks")
def load_masks(checkpoint: str | Path) -> lap_ext.Masks:
    """Reads the masks in a Lightning checkpoint to the CPU without executing pickled code.

    Args:
        checkpoint: the file that training with a `PruningCallback` has saved.

    Raises:
        OSError: there is no such file.
        ValueError: the file has no masks (save_weights_only=True leaves them out), or torch.load
            with weights_only=True rejects the file.

    Example:
        >>> import tempfile, torch
        >>> pruning = PruningCallback({"fc": torch.tensor([[True, False, True]])})
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     saved = {"callbacks": {pruning.state_key: pruning.state_dict()}}
        ...     torch.save(saved, f"{directory}/last.ckpt")  # as ModelCheckpoint does
        ...     load_masks(f"{directory}/last.ckpt")
        Masks(1 layer, 2 of 3 weights kept, sparsity 0.3333)
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise LapFileNotFoundError(
            "a checkpoint of Lightning's Trainer",
            f"nothing at {str(checkpoint)!r}",
            "Check the path.",
            number=errno.ENOENT,
        ) from None
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise LapValueError(
            "a checkpoint that torch.load reads with weights_only=True",
            f"{str(checkpoint)!r}: {str(error).splitlines()[0]}",
        ) from None
    states = saved.get("callbacks") if isinstance(saved, dict) else None
    if not isinstance(states, dict) or STATE_KEY not in states:
        raise LapValueError(
            "a checkpoint of a training with PruningCallback",
            f"{str(checkpoint)!r} without its state",
            "ModelCheckpoint(save_weights_only=True) leaves it out.",
        )
    return _unpacked(states[STATE_KEY])


def _unpacked(state: Mapping[str, Any]) -> lap_ext.Masks:
    """Returns the masks of a state."""
    try:
        shapes = {name: tuple(state["layers"][name]) for name in state["masks"]}
        packed = dict(state["masks"])
        fits = all(
            packed[name].dtype == torch.uint8 and packed[name].numel() == (math.prod(x) + 7) // 8
            for name, x in shapes.items()
        )
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise LapValueError("an undamaged state of PruningCallback", "masks that do not fit layers")
    masks = {name: unpack(packed[name], shape) for name, shape in shapes.items()}
    return lap_ext.Masks(masks, state.get("structure"))


def _own_example(pl_module: Any) -> Any:
    """Returns the inputs that Lightning's own summaries call the module with."""
    inputs = pl_module.example_input_array
    if inputs is None:
        raise LapTypeError(
            "{argument} (for the trace)",
            f"none, and {type(pl_module).__name__} has no example_input_array",
            "Pass a small batch as forward takes it.",
            argument="example_inputs",
        )
    return inputs
