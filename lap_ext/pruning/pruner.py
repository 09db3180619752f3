# SPDX-License-Identifier: MIT
"""Prunes while training: a schedule says when and how much, masks carry over from one to the next.

    step k   the k-th call of Pruner.step, from 0
             sparsity = schedule(k); None: nothing is scored
             masks    = prune(model, sparsity, masks=masks): pruned weights never return
             masks.keep(model, optimizer), in place of the handle of the masks before

The model is traced once; it has no hook and no wrapper. All that a resumed run needs is the number
of steps and the masks: a schedule is a pure function of the step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lap_ext._text import did_you_mean, lines, some
from lap_ext.allocation import Sparsity
from lap_ext.criteria import Criterion
from lap_ext.masks import Masks, pack, unpack
from lap_ext.masks.keep import check_hooks
from lap_ext.masks.targets import zero_
from lap_ext.pruning.model import run
from lap_ext.pruning.plan import options_of, plan_of, topology_of
from lap_ext.pruning.result import PruneResult, row_of
from lap_ext.topology import Layer

Schedule: TypeAlias = Callable[[int], Sparsity | None]

_TRACE = ("kwargs", "neighbors", "unknown")  # the options of prune that are trace's
_PLAN = tuple(inspect.signature(options_of).parameters)[1:]  # those that say how it ranks
_RUN = ("data", "on_progress")  # those that each pruning takes
_OWN = ("sparsity", "masks", "apply")  # those that the pruner decides
_LISTED = 10  # of many differences, the first ones say it


class Pruner:
    """Prunes a model while it is trained, and keeps pruned weights at zero.

    Call `step` after every step of the optimizer; the k-th call (from 0) prunes to schedule(k).
    What the optimizer does in between cannot move a pruned weight: gradients and moments of pruned
    weights are 0, as `Masks.keep` has it. With gradient accumulation, autocast, GradScaler and
    torch.compile nothing else is needed. After a pruning an average of the weights (AveragedModel)
    that is older needs `pruner.masks.apply(average)`, and a captured CUDA graph a new capture.

    Args:
        model: as in `prune`; also what torch.compile, DataParallel or DistributedDataParallel made
            of it. The processes of a DistributedDataParallel take the masks of the first one (the
            running statistics of batch norms differ between them) and must all call `step`.
        example_inputs: as in `prune`: for the trace of the model, which is made once, here.
        schedule: step -> the sparsity to prune to, or None. One of `lap_ext.schedule`, or your own
            function; a sparsity is all that `prune` takes: a number, a dict, an allocation.
        optimizer: what trains the model, or several of them. None: `step` sets pruned weights back
            to zero itself, so it has to follow every step; moments are then the optimizer's own.
        options: criterion, scope, normalize, order, rounds, exclude, bn, skip, data, kwargs,
            neighbors, unknown and on_progress, as in `prune`. data is iterated over at every pruning.

    Attributes:
        layers: the layers that it prunes, in the network's order.
        topology: the trace. Another pruner of this model takes it in place of example_inputs.
        masks: the masks so far, `Masks`; empty before the first pruning.
        result: the last pruning's `PruneResult`, or None.

    Raises:
        TopologyError: the model cannot be traced.
        TypeError, ValueError: as `prune`; the optimizer trains none of the layers.

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

        The paper's schedules, a ratio for each layer: iterative, which prunes what is left by the
        ratios after every 1000 steps of training, and one-shot, which prunes the dense net once, to
        what the iterative one has after 5 times.

        >>> from lap_ext.allocation import paper
        >>> def iterative(step):
        ...     times, off = divmod(step + 1, 1000)
        ...     return paper([0.5, 0.25], times) if not off and times <= 5 else None
        >>> def one_shot(step):
        ...     return paper([0.5, 0.25], 5) if step + 1 == 1000 else None
    """

    def __init__(
        self,
        model: Module,
        example_inputs: Any,
        schedule: Schedule,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        **options: Any,
    ) -> None:
        _check_schedule(schedule)
        _check_options(options)
        self._schedule = schedule
        self._model, self._group = _unwrapped(model)
        traced = {name: options.pop(name) for name in _TRACE if name in options}
        self._data = options.pop("data", None)
        self._on_progress = options.pop("on_progress", None)
        checked = options_of("Pruner", **options)
        self.topology = topology_of("Pruner", self._model, example_inputs, **traced)
        self._plan = plan_of("Pruner", self.topology, checked)
        self.layers: Sequence[Layer] = tuple(self._plan.layers)
        self._check_data()
        self._optimizers = _optimizers(optimizer)
        self._check_optimizers()
        self._step = 0
        self._removed = False
        self._hooks = ExitStack()
        self.masks = Masks({})
        self.result: PruneResult | None = None

    def __repr__(self) -> str:
        return f"Pruner(after {self._step} steps, {self.masks!r})"

    @property
    def sparsity(self) -> float:
        """Fraction removed so far of the weights of the pruned layers; 0.0 before the first time."""
        return self.masks.sparsity

    def step(self) -> PruneResult | None:
        """Counts a step of training and prunes if the schedule says so.

        Returns:
            What it pruned, or None if this was no step to prune at.

        Raises:
            ValueError: as `prune`; neither model nor pruner were changed.
            RuntimeError: after `remove`.
        """
        self._check_not_removed("step")
        sparsity = self._schedule(self._step)
        if sparsity is not None:
            self._prune(sparsity)
        elif not self._optimizers:
            for name, weight in self._weights(self.masks):
                zero_(weight, self.masks[name].to(weight.device))
        self._step += 1
        return None if sparsity is None else self.result

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: save it with the states of the model and the optimizer.

        Returns:
            step: calls of `step` so far. masks: layer name -> one bit per weight, uint8. layers:
            name -> shape of every layer of the model. torch.load reads it with weights_only=True.

        Example:
            >>> import io, torch
            >>> from lap_ext.pruning.pruner import Pruner
            >>> from lap_ext.schedule import iterative
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> pruner = Pruner(net, torch.ones(1, 4), iterative(0.5, rounds=3, every=10))
            >>> result = pruner.step()
            >>> file = io.BytesIO()
            >>> torch.save({"model": net.state_dict(), "pruner": pruner.state_dict()}, file)

            Another day, after the same lines that made the model and the pruner:

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
            "layers": self._layers(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called; the masks are applied to the model at once.

        The run then equals one that was never interrupted, bit for bit, if its batches do. A
        pruner that has pruned more since then is loaded before the optimizer, which would lose
        the moments of weights that come back; a new one in any order.

        Raises:
            TypeError, ValueError: it is not such a state, or one of other layers; nothing was
                changed.
            RuntimeError: after `remove`.
        """
        self._check_not_removed("load_state_dict")
        step, masks = _unpacked(state, self._layers())
        self._adopt(masks)
        self._step = step

    def remove(self) -> None:
        """Ends it: the optimizer is as before and may move pruned weights, which are zero now."""
        self._hooks.close()
        self._removed = True

    def _prune(self, sparsity: Sparsity) -> None:
        """Masks first: where scoring fails nothing was changed."""
        here = {
            name: self.masks[name].to(weight.device) for name, weight in self._weights(self.masks)
        }
        result = run(self._plan, sparsity, here, self._data, self._on_progress)
        self._adopt({**here, **_agreed(result.masks, self._group)})

    def _adopt(self, masks: Mapping[str, Tensor]) -> None:
        """From now on these masks count."""
        layers = self.topology.layers
        found = Masks(
            {name: masks[name].to(weight.device) for name, weight in self._weights(masks)}
        )
        if not self._optimizers:
            found.apply(self._model)
        with ExitStack() as hooks:  # the new ones before the old ones go
            for optimizer in self._optimizers:
                hooks.enter_context(found.keep(self._model, optimizer))
            self._hooks.close()
            self._hooks = hooks.pop_all()
        self.masks = found
        rows = [row_of(layers[name], mask) for name, mask in found.items()]
        self.result = PruneResult(found, rows, self._plan.criterion.name) if rows else None

    def _weights(self, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The masked layers in the network's order, each with its parameter as it is now."""
        for name, layer in self.topology.layers.items():
            if name in masks:
                yield name, layer.weight

    def _layers(self) -> dict[str, list[int]]:
        """Name -> shape: what a state must fit."""
        return {name: list(layer.shape) for name, layer in self.topology.layers.items()}

    def _check_data(self) -> None:
        """Raises what the criterion says of the data, but does not read it yet."""
        overridden = type(self._plan.criterion).prepare != Criterion.prepare
        if self._data is None or not overridden:
            self._plan.criterion.prepare(self._plan.network({}), self._data)

    def _check_optimizers(self) -> None:
        weights = {id(layer.weight) for layer in self.layers}
        for optimizer in self._optimizers:
            check_hooks("Pruner", optimizer)
            if not any(id(p) in weights for g in optimizer.param_groups for p in g["params"]):
                few = some((layer.name for layer in self.layers), _LISTED)
                raise ValueError(
                    "Pruner: expected an optimizer that trains layers to prune, got "
                    f"{type(optimizer).__name__} with none of {few}. Make it from the parameters "
                    "of this model; one that trains other parameters need not be passed."
                )

    def _check_not_removed(self, name: str) -> None:
        if self._removed:
            raise RuntimeError(
                f"Pruner.{name}: expected a pruner that still prunes, got one after remove(). "
                "Make a new one and load this one's state_dict()."
            )


def _check_schedule(schedule: object) -> None:
    if callable(schedule) and not isinstance(schedule, type):
        return
    cure = "Pass lap_ext.schedule.one_shot(sparsity) to prune once."
    if isinstance(schedule, type):
        cure = f"Call it: {schedule.__name__}(...)."
    got = f"the class {schedule.__name__}" if isinstance(schedule, type) else repr(schedule)
    raise TypeError(
        f"Pruner: expected schedule to be a function step -> sparsity or None, got {got}. {cure}"
    )


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _OWN:
            raise TypeError(
                f"Pruner: expected no {name} (the schedule says how much, masks carry over and are "
                "applied), got one. Leave it out."
            )
        if name not in (known := (*_TRACE, *_PLAN, *_RUN)):
            raise TypeError(
                f"Pruner: expected options of prune, got {name!r}. "
                f"{did_you_mean(name, known) or 'They are ' + ', '.join(known) + '.'}"
            )
    if isinstance(options.get("data"), Iterator):
        raise TypeError(
            "Pruner: expected data that can be iterated over at every pruning, got "
            f"{type(options['data']).__name__}, which ends after the first. Pass a list or a "
            "DataLoader."
        )


def _unwrapped(model: Module) -> tuple[Module, Any]:
    """The user's own module, and the process group if its gradients are averaged over one."""
    group = None
    while True:
        if isinstance(model, DistributedDataParallel):
            model, group = model.module, model.process_group
        elif isinstance(model, DataParallel):
            model = model.module
        elif isinstance(model, Module) and "_orig_mod" in model._modules:  # of torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model, group


def _optimizers(given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def _agreed(masks: Masks, group: Any) -> Mapping[str, Tensor]:
    """The masks of the first process of the group.

    Weights are equal in all of them, but not what batch norms have seen, nor data.
    """
    if group is None:
        return masks
    found = {}
    for name, mask in masks.items():
        bits = pack(mask)
        torch.distributed.broadcast(bits, group=group, group_src=0)
        found[name] = unpack(bits, tuple(mask.shape))
    return found


def _unpacked(
    state: Mapping[str, Any], layers: Mapping[str, list[int]]
) -> tuple[int, dict[str, Tensor]]:
    """(step, masks) of a state, if it fits these layers."""
    function = "Pruner.load_state_dict"
    if not (
        isinstance(state, Mapping)
        and all(isinstance(state.get(name), Mapping) for name in ("masks", "layers"))
    ):
        got: object = type(state).__name__
        if isinstance(state, Mapping):
            got = {name: type(x).__name__ for name, x in list(state.items())[:_LISTED]}
        raise TypeError(
            f"{function}: expected what Pruner.state_dict returned (step, masks and layers), got "
            f"{got}."
        )
    saved = {name: list(shape) for name, shape in state["layers"].items()}
    differing = [
        f"{name!r}: {saved.get(name, 'none')} in the state, {layers.get(name, 'none')} here"
        for name in {**layers, **saved}
        if saved.get(name) != layers.get(name)
    ]
    if differing:
        raise ValueError(
            f"{function}: expected the state of a pruner of the same layers, got one that differs "
            f"in {len(differing)}. Build the model as it was then."
            f"{lines(differing, _LISTED)}"
        )
    step, bits = state.get("step"), state["masks"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{function}: expected step to be a whole number >= 0, got {step!r}.")
    for name, packed in bits.items():
        if name not in layers or not _is_packed(packed, math.prod(layers[name])):
            plain = not isinstance(packed, Tensor)
            found = type(packed).__name__ if plain else f"{packed.dtype} {list(packed.shape)}"
            raise ValueError(
                f"{function}: expected one bit per weight of layers of the model, got {found} for "
                f"{name!r}. The state is damaged."
            )
    return step, {name: unpack(x, tuple(layers[name])) for name, x in bits.items()}


def _is_packed(x: object, count: int) -> bool:
    """Whether it can be the bits of a mask of so many weights."""
    return isinstance(x, Tensor) and x.dtype == torch.uint8 and list(x.shape) == [(count + 7) // 8]
