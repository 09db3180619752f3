# SPDX-License-Identifier: MIT
"""Prunes during training, when and as far as a schedule says; each pruning extends the masks.

    step k   the k-th call of Pruner.step, from 0
             sparsity = schedule(k); None: nothing is scored
             masks    = prune(model, sparsity, masks=masks): pruned weights stay pruned
             masks.keep(model, optimizer) replaces the handle of the previous masks

The model is traced once and has no hooks or wrappers. To resume, a run needs only the number of
steps and the masks, because a schedule is a pure function of the step.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lap_ext._text import layer_name, some
from lap_ext.allocation import Sparsity
from lap_ext.computed import reserve_masks
from lap_ext.criteria import CriterionLike
from lap_ext.criteria.context import Network
from lap_ext.errors import LapRuntimeError, LapTypeError, LapValueError, callback, calling
from lap_ext.masks import Masks, pack, unpack
from lap_ext.masks.keep import KeepHandle, check_hooks
from lap_ext.masks.targets import zero_
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
from lap_ext.places import Memory
from lap_ext.progress import Progress
from lap_ext.pruning import pruner_state
from lap_ext.pruning.dense import ZERO
from lap_ext.pruning.in_memory import result_of, run
from lap_ext.pruning.patterns import by_name
from lap_ext.pruning.plan import options_of, plan_of, topology_of
from lap_ext.pruning.pruner_state import LISTED, Pruning, Schedule
from lap_ext.pruning.result import PruneResult, row_of
from lap_ext.structures import Aggregate, StructureLike
from lap_ext.topology import Layer, Topology
from lap_ext.topology.accepted import peeled


class Pruner:
    """Prunes a model during training and keeps pruned weights at zero.

    Call `step` after every step of the optimizer; the k-th call (from 0) prunes to schedule(k).
    In between, the optimizer cannot change a pruned weight: its gradient and its moments are
    0, as with `Masks.keep`, also in methods of its own (SAM's first_step and second_step). Gradient
    accumulation, clipping, autocast, GradScaler and torch.compile work without further calls. If
    you keep an average of the weights (AveragedModel), call `pruner.masks.apply(average)` after
    each pruning; if you use a CUDA graph, capture it again. A weight that a module computes
    (torch.nn.utils.parametrize, weight and spectral norm) gets a mask as a buffer of the model at
    once, so that a resumed run can load the model's state.

    copy.deepcopy((model, optimizer, pruner)) gives a pruner of the copied model, which shares
    schedule and data with this one. Copying or pickling a pruner alone is a TypeError.

    Args:
        model: as in `prune`, or wrapped by torch.compile, DataParallel or DistributedDataParallel.
            All processes of a DistributedDataParallel must call `step`; they use the masks of the
            first process, because the running statistics of batch norms differ between processes.
        example_inputs: as in `prune`. The model is traced once, here.
        schedule: a function that takes the step and returns the sparsity to prune to, or None to
            skip pruning at that step. Use one from `lap_ext.schedule` or your own. The sparsity
            may be anything that `prune` takes: a number, a dict or an allocation.
        optimizer: the optimizer of the model, or several. With None, `step` itself sets pruned
            weights back to zero, so call `step` after every step of the optimizer; the optimizer's
            moments are not changed.
        topology: as in `prune`.
        criterion: as in `prune`.
        structure: as in `prune`. On the way to an N:M pattern, floor(sparsity * M) of every M
            weights are removed, so that the schedule ends at the sparsity 1 - N / M.
        aggregate: as in `prune`.
        multiple_of: as in `prune`.
        strict: as in `prune`.
        cost: as in `prune`.
        uniform: as in `prune`.
        scope: as in `prune`.
        normalize: as in `prune`.
        order: as in `prune`.
        rounds: as in `prune`, for each pruning.
        layers: as in `prune`.
        exclude: as in `prune`.
        min_keep: as in `prune`.
        batch_norm: as in `prune`.
        residual: as in `prune`.
        data: as in `prune`; every pruning iterates over it again, so an iterator is not enough.
        neighbors: as in `prune`.
        on_unsupported: as in `prune`.
        on_progress: as in `prune`.

    Attributes:
        layers: the layers to prune, in the network's order.
        topology: the topology; another pruner of this model accepts it instead of example_inputs.
        masks: the current `Masks`; empty before the first pruning.
        result: the `PruneResult` of the last pruning, or None.

    Raises:
        TopologyError: the model cannot be traced.
        TypeError, ValueError: as in `prune`; also if the optimizer trains none of the layers.

    Example:
        >>> import torch
        >>> from lap_ext.pruning.pruner import Pruner
        >>> from lap_ext.schedule import cubic
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> schedule = cubic(0.75, start=10, end=30, every=5)
        >>> pruner = Pruner(net, torch.ones(1, 4), schedule, optimizer=optimizer)
        >>> for batch in torch.randn(50, 16, 4):
        ...     optimizer.zero_grad()
        ...     net(batch).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> pruner.sparsity, int((net[0].weight != 0).sum())
        (0.75, 8)

        The paper's schedules, with a ratio for each layer: iterative prunes the remaining weights
        by the ratios after every 1000 steps of training; one-shot prunes the dense network once, to
        the sparsity that iterative reaches after 5 prunings.

        >>> from lap_ext.allocation import compounded
        >>> def iterative(step):
        ...     times, off = divmod(step + 1, 1000)
        ...     return compounded([0.5, 0.25], times) if not off and times <= 5 else None
        >>> def one_shot(step):
        ...     return compounded([0.5, 0.25], 5) if step + 1 == 1000 else None
    """

    @calling("Pruner")
    def __init__(
        self,
        model: Module,
        example_inputs: Inputs | None,
        schedule: Schedule,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        topology: Topology | None = None,
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
        _check_schedule(schedule)
        _check_repeatable(data)
        self._schedule = schedule
        *wrappers, self._model = peeled(model)
        groups = [x.process_group for x in wrappers if isinstance(x, DistributedDataParallel)]
        self._group = groups[0] if groups else None  # that gradients are averaged over
        self._data, self._on_progress = data, on_progress
        options = options_of(
            criterion,
            scope=scope,
            normalize=normalize,
            order=order,
            rounds=rounds,
            batch_norm=batch_norm,
            residual=residual,
            layers=layers,
            exclude=exclude,
            min_keep=min_keep,
            structure=structure,
            aggregate=aggregate,
            multiple_of=multiple_of,
            strict=strict,
            cost=cost,
            uniform=uniform,
        )
        self.topology = topology_of(
            self._model, example_inputs, topology, neighbors, on_unsupported
        )
        self._plan = plan_of(self.topology, options)
        self.layers: Sequence[Layer] = tuple(self._plan.layers)
        self._check_data()
        self._optimizers = _optimizers(optimizer)
        self._check_optimizers()
        self._step = 0
        self._removed = False
        self._prunings: list[Pruning] = []
        self._handle: KeepHandle | None = None
        self.masks = Masks({})
        self.result: PruneResult | None = None
        reserve_masks(self._model)

    def __repr__(self) -> str:
        return f"Pruner(after {self._step} steps, {self.masks!r})"

    @calling("Pruner")
    def __deepcopy__(self, memo: dict[int, Any]) -> Pruner:
        """Copies the pruner for the copy of its model that the same call has made."""
        model = memo.get(id(self._model))
        if not isinstance(model, Module) or not vars(model):
            alone = model is None
            raise LapTypeError(
                "a copy of the pruner with its model",
                f"one {'of the pruner alone' if alone else 'within the copy of its model'}",
                "Call model, optimizer, pruner = copy.deepcopy((model, optimizer, pruner)); to "
                "save a pruner, save its state_dict().",
            )
        for shared in (self._schedule, self._data, self._on_progress, self._group):
            memo[id(shared)] = shared
        twin = memo[id(self)] = object.__new__(Pruner)
        own = {name: x for name, x in vars(self).items() if name != "_handle"}
        vars(twin).update(copy.deepcopy(own, memo), _handle=None)
        if self._handle is not None:
            twin._use(twin.masks, self.result.left_dense if self.result else {})
        return twin

    @calling("Pruner")
    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuses to be pickled: what a run needs to resume is the state."""
        raise LapTypeError(
            "the pruner's state_dict() to be saved or sent (a pruner belongs to its model and "
            "optimizers)",
            "the pruner itself",
            "Make a new Pruner of the other model and load the state_dict() there.",
        )

    @property
    def sparsity(self) -> float:
        """The fraction of the pruned layers' weights that has been removed so far; 0.0 at first.

        With units across layers, biases and norms count too.
        """
        return self.masks.sparsity

    @calling("Pruner.step")
    def step(self) -> PruneResult | None:
        """Counts a training step and prunes if the schedule says so.

        Pruned weights are zero afterwards, whatever has changed them: an optimizer that this
        pruner does not know, or model.load_state_dict. The first time that some are not, a warning
        names the layers.

        Returns:
            The result of the pruning, or None if this step did not prune.

        Raises:
            ValueError: as in `prune`; neither the model nor the pruner is changed.
            RuntimeError: `remove` has been called, or the model has another parameter in place of
                one that the optimizers keep; nothing is changed.
        """
        self._check_not_removed()
        if self._handle is not None:
            self._handle.check()
        sparsity = self._sparsity(self._step)
        if sparsity is None:
            self._zero()
        else:
            self._prune(sparsity)
            self._prunings.append([self._step, pruner_state.described(sparsity)])
        self._step += 1
        return None if sparsity is None else self.result

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs; save it with those of model and optimizer.

        Returns:
            A dict. "step" is the number of calls of `step`; "masks" maps layer names to one bit per
            weight, as uint8; "structure" is that of the masks, or None; "layers" maps the name of
            every layer of the model to its shape, and with units across layers those of biases and
            norms to theirs; "options" are those that decide a pruning;
            "prunings" lists [step, sparsity] of every pruning so far. torch.load reads the saved
            dict with weights_only=True.

        Example:
            >>> import io, torch
            >>> from lap_ext.pruning.pruner import Pruner
            >>> from lap_ext.schedule import iterative
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> pruner = Pruner(net, torch.ones(1, 4), iterative(0.5, rounds=3, every=10))
            >>> result = pruner.step()
            >>> file = io.BytesIO()
            >>> torch.save({"model": net.state_dict(), "pruner": pruner.state_dict()}, file)

            In a later run, after the same lines that created the model and the pruner:

            >>> _ = file.seek(0)
            >>> saved = torch.load(file, weights_only=True)
            >>> _ = net.load_state_dict(saved["model"])
            >>> pruner.load_state_dict(saved["pruner"])
            >>> pruner
            Pruner(after 1 steps, Masks(1 layer, 4 of 8 weights kept, sparsity 0.5))
        """
        return {
            "step": self._step,
            "masks": {name: pack(mask) for name, mask in self.masks.items()},
            "structure": self.masks.structure,
            "layers": self._shapes(),
            "options": pruner_state.options_of(self._plan),
            "prunings": [list(pruning) for pruning in self._prunings],
        }

    @calling("Pruner.load_state_dict")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes where `state_dict` was called and applies the masks to the model at once.

        With the same batches, the run is bit-identical to one that was never interrupted. If
        this pruner has pruned more since `state_dict` was called, load the pruner before its
        optimizer, which would otherwise lose the moments of weights that return. A new pruner and
        its optimizer can be loaded in any order.

        The state must be one that this pruner could have reached: its options are the same, and its
        schedule, which is asked about the steps so far, would have pruned at the same steps to the
        same sparsities. To continue under other options or by another schedule on purpose, remove
        "options" or "prunings" from the state: what is not there is not compared. An allocation of
        your own without a repr is compared by the name of its class alone.

        Raises:
            TypeError, ValueError: the argument is not such a state, or its layers, options or
                prunings differ; nothing is changed.
            RuntimeError: `remove` has been called.
        """
        self._check_not_removed()
        step, masks, prunings = pruner_state.unpacked(state, self._shapes())
        if "options" in state:
            pruner_state.check_options(state["options"], pruner_state.options_of(self._plan))
        expected = pruner_state.prunings_of(self._sparsity, step, prunings or [])
        if prunings is not None:
            pruner_state.check_prunings(prunings, expected, step)
        left_dense = self._plan.left_dense | self._zero_layers(masks)
        self._use(Masks(masks, state.get("structure")), left_dense)
        self._step, self._prunings = step, expected

    def remove(self) -> None:
        """Removes the optimizer's hooks; it may then change pruned weights, which are now zero."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._removed = True

    def _sparsity(self, step: int) -> Sparsity | None:
        """Asks the schedule about a step; layers are named as in the state."""
        with callback():
            sparsity = self._schedule(step)
        return None if sparsity is None else by_name(self.topology, sparsity)

    def _zero(self) -> None:
        """Zeroes pruned weights; where optimizers keep them, only those that others have moved."""
        if self._handle is not None:
            self._handle.zero_changed()
        else:
            masked = {x.name for x in self.topology.layers.values() if x.pruned_by != "zeros"}
            for name, weight in self._weights(self.masks):
                if name not in masked:
                    zero_(weight, self.masks[name].to(weight.device))

    def _prune(self, sparsity: Sparsity) -> None:
        """Computes all masks before it changes the model, so that errors leave it unchanged."""
        current = {
            name: self.masks[name].to(weight.device) for name, weight in self._weights(self.masks)
        }
        given = None if not current else current | self._zeros_of_others(current)
        result = run(self._plan, sparsity, given, self._data, self._on_progress)
        masks = {**current, **_broadcast(result.masks, self._group)}
        self._use(Masks(masks, result.structure), result.left_dense)

    def _zeros_of_others(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks zeros of layers that no pruning has masked yet, as the first pruning does."""
        others = (x for x in self._plan.layers if x.name not in masks and bool(x.weight.any()))
        return {x.name: x.weight.detach() != 0 for x in others}

    def _zero_layers(self, masks: Mapping[str, Tensor]) -> dict[str, str]:
        """Finds the layers that the prunings so far have left as they are."""
        others = (x for x in self._plan.layers if masks and x.name not in masks)
        return {x.name: ZERO for x in others if not bool(x.weight.any())}

    def _use(self, masks: Masks, left_dense: Mapping[str, str]) -> None:
        """Replaces the masks: applies the new ones and keeps them with the optimizers."""
        placed = {name: masks[name].to(weight.device) for name, weight in self._weights(masks)}
        new = Masks(placed, masks.structure)
        if self._optimizers:
            before, self._handle = self._handle, new.keep(self._model, self._optimizers)
            if before is not None:
                self._handle.told = before.told
                before.remove()
        else:
            new.apply(self._model)
        self.masks = new
        empty = self.result.empty_layers if self.result else ()
        every = [(x, new[name]) for name, x in self.topology.layers.items() if name in new]
        structure = self._plan.options.structure
        rows = [row_of(x, mask, int(x.effective.count_nonzero()), structure) for x, mask in every]
        self.result = result_of(self._plan, new, rows, left_dense) if rows else None
        if self.result and self._plan.options.min_keep is None:
            self.result.warn_if_empty(known=empty)

    def _weights(self, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields the masked layers in the network's order, each with its current parameter.

        After them, the biases, norms and the like that are masked with units across layers.
        """
        for name, layer in self.topology.layers.items():
            if name in masks:
                yield name, layer.weight
        groups = self._plan.groups
        for parameter in () if groups is None else groups.vector_shapes():
            if layer_name(parameter) in masks:
                yield layer_name(parameter), self._model.get_parameter(parameter)

    def _shapes(self) -> dict[str, list[int]]:
        """Returns layer name -> shape, which a state must match."""
        shapes = {name: layer.shape for name, layer in self.topology.layers.items()}
        return {name: list(shape) for name, shape in (shapes | self._vectors()).items()}

    def _vectors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of biases, norms and the like that are masked, by layer name."""
        groups = self._plan.groups
        shapes = {} if groups is None else groups.vector_shapes()
        return {layer_name(name): shape for name, shape in shapes.items()}

    def _check_data(self) -> None:
        """Raises the criterion's errors about data, without reading the data yet."""
        criterion = self._plan.criterion
        if isinstance(self._data, (str, os.PathLike, type(None))) or not criterion.reads_data:
            network = Network(Memory(self.topology), self._plan.options.batch_norm)
            criterion.prepare(network, self._data)

    def _check_optimizers(self) -> None:
        weights = {id(layer.weight) for layer in self.layers if layer.pruned_by == "zeros"}
        for optimizer in self._optimizers:
            check_hooks(optimizer)
            if weights and not any(
                id(p) in weights for g in optimizer.param_groups for p in g["params"]
            ):
                names = some((layer.name for layer in self.layers), LISTED)
                raise LapValueError(
                    "an optimizer that trains layers to prune",
                    f"{type(optimizer).__name__} with none of {names}",
                    "Make it from the parameters of this model; one that trains other parameters "
                    "need not be passed.",
                )

    def _check_not_removed(self) -> None:
        if self._removed:
            raise LapRuntimeError(
                "a pruner that still prunes",
                "one after remove()",
                "Make a new one and load this one's state_dict().",
            )


def _check_schedule(schedule: object) -> None:
    if callable(schedule) and not isinstance(schedule, type):
        return
    cure = "Pass lap_ext.schedule.one_shot(sparsity) to prune once."
    if isinstance(schedule, type):
        cure = f"Call it: {schedule.__name__}(...)."
    got = f"the class {schedule.__name__}" if isinstance(schedule, type) else repr(schedule)
    raise LapTypeError("schedule to be a function step -> sparsity or None", got, cure)


def _check_repeatable(data: object) -> None:
    if isinstance(data, Iterator):
        raise LapTypeError(
            "{argument} that can be iterated over at every pruning",
            f"{type(data).__name__}, which ends after the first",
            "Pass a list or a DataLoader.",
            argument="data",
        )


def _optimizers(given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def _broadcast(masks: Masks, group: Any) -> Mapping[str, Tensor]:
    """Gives all processes of the group the masks of the first one.

    Their weights are equal, but not the running statistics of batch norms, nor the data.
    """
    if group is None:
        return masks
    result = {}
    for name, mask in masks.items():
        bits = pack(mask)
        torch.distributed.broadcast(bits, group=group, group_src=0)
        result[name] = unpack(bits, tuple(mask.shape))
    return result
