# SPDX-License-Identifier: MIT
"""Offers lookahead scores to Torch-Pruning as an importance of channels, coupled or not.

    importance[c] = sum of score(w)^2 over the weights w that are removed with channel c

    >>> import torch, torch_pruning as tp
    >>> from lap_ext.adapters.torch_pruning import LookaheadImportance
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> example = torch.ones(1, 4)
    >>> importance = LookaheadImportance(net, example)
    >>> pruner = tp.pruner.BasePruner(
    ...     net, example, importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[net[2]])
    >>> for _ in range(2):  # train in between
    ...     pruner.step()
    >>> [list(layer.weight.shape) for layer in (net[0], net[2])]
    [[4, 4], [2, 4]]

The weights of a channel are those that Torch-Pruning removes with it: rows of the layers that
produce the channel and columns of the layers that read it, through residual connections and
concatenations. lap_ext scores these weights with a trace of its own. A weight in both a row and a
column of the same channel (of a layer whose input is added to its output), or one that two modules
share, counts once. Batch norms scale the scores of their neighbors and add nothing themselves.

Channels that can only be removed together (the two halves of a gated layer) all get the sum. A
weight that Torch-Pruning assigns to no single channel (the keys and values that several query heads
share) does not count.

Scores are computed anew for each pass over the groups. The model is traced again after channels
have been removed. If a model has hard-coded sizes (the number of heads, a reshape), correct them
before the next step, as before any other use of the model. Where channels are split (chunk),
Torch-Pruning 1.6.1 itself needs a new pruner for each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.criteria import CriterionLike
from lap_ext.errors import (
    LapImportError,
    LapTypeError,
    LapValueError,
    TopologyError,
    callback,
    calling,
)
from lap_ext.options import BatchNorm, Data, Inputs, Normalize, OnUnsupported, Residual
from lap_ext.progress import Progress

with calling("lap_ext.adapters.torch_pruning"):
    try:
        import torch_pruning as tp
        from torch_pruning.pruner import function as remove
    except ImportError as error:
        raise LapImportError(
            "the torch-pruning package (1.6 or later)",
            f"none that can be imported ({error})",
            "Run: pip install torch-pruning",
            name="torch_pruning",
        ) from error
    if not hasattr(tp.pruner, "BasePruner"):
        raise LapImportError(
            "torch-pruning 1.6 or later (it has BasePruner)",
            "an older one",
            "Run: pip install -U torch-pruning",
            name="torch_pruning",
        )


class LookaheadImportance(tp.importance.Importance):
    """Computes the importance of the channels of a group, for the pruners of Torch-Pruning.

        importance[c] = sum of score(w)^2 over the weights w that are removed with channel c

    To keep channels of a layer, use the pruner's ignored_layers. There is no structure= here:
    Torch-Pruning itself says what is removed together.

    Args:
        model: the model that the pruner prunes.
        example_inputs: as in `lap_ext.prune`.
        normalizer: what makes groups comparable if a pruner ranks them together (global_pruning):
            any normalizer that Torch-Pruning's GroupMagnitudeImportance takes ("mean", "sum",
            "max", "lamp", ..., or a function). None leaves the result of the formula as it is.
        criterion: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        data: as in `lap_ext.prune`; it is read once per pass, so an iterator is not enough.
        neighbors: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        on_progress: as in `lap_ext.prune`.

    Raises:
        TypeError: model is not a module.
        ValueError: the normalizer is unknown.

    Example:
        >>> import torch, torch_pruning as tp
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.ones(1, 1))
        >>> group = graph.get_pruning_group(net[0], tp.prune_linear_out_channels, [0, 1])
        >>> # |1| * |3| for the row and |3| * |1| for the column; |2| * |-1| and |-1| * |2|
        >>> LookaheadImportance(net, torch.ones(1, 1), normalizer=None)(group)
        tensor([18.,  8.], dtype=torch.float64)
    """

    @calling("LookaheadImportance")
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs | None,
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        *,
        criterion: CriterionLike = "lookahead",
        normalize: Normalize = "auto",
        batch_norm: BatchNorm = "edge",
        residual: Residual = "sum",
        data: Data | None = None,
        neighbors: Mapping[str, Any] | None = None,
        on_unsupported: OnUnsupported = "raise",
        on_progress: Callable[[Progress], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise LapTypeError(
                "{argument} to be a torch.nn.Module", type(model).__name__, argument="model"
            )
        # for its normalizers
        self._group_magnitude = tp.importance.GroupMagnitudeImportance(normalizer=normalizer)
        _check_normalizer(self._group_magnitude)
        self._tracing: dict[str, Any] = {"neighbors": neighbors, "on_unsupported": on_unsupported}
        self._scoring: dict[str, Any] = {
            "criterion": criterion,
            "normalize": normalize,
            "batch_norm": batch_norm,
            "residual": residual,
            "data": data,
            "on_progress": on_progress,
        }
        self._model = model
        self._example = example_inputs
        self._topology: lap_ext.Topology | None = None
        self._shapes: dict[str, torch.Size] = {}  # of the parameters when it was traced
        self._scores: dict[int, Tensor] = {}  # id of a parameter -> scores
        self._scored: list[tuple[Any, int]] = []  # weak references to the model's tensors, versions
        self._roots: set[Any] = set()  # of the groups since then

    @calling("LookaheadImportance")
    def __call__(self, group: Any) -> Tensor | None:
        """Computes the importance of the channels of a group.

        Args:
            group: of a `DependencyGraph` of the model as it is now, with all channels of a layer or
                some.

        Returns:
            A number >= 0 for each index of the group's root, in their order, float64 on the CPU;
            with a normalizer, what it returns. None, as in Torch-Pruning, for groups that must not
            be pruned: without weights, or with outputs of an LSTM, which Torch-Pruning 1.6.1 cannot
            remove.

        Raises:
            TopologyError: the model cannot be traced.
            ValueError: the group is of another model or older than the last pruning; it has weights
                of a module with a customized pruner.
        """
        root = group[0].dep
        self._refresh((root.target.module, root.handler))
        coupled = _root_channels(group)
        removed: dict[int, list[tuple[_ChannelAxis, Tensor]]] = {}  # by id of a weight
        for dep, idxs in group.items:
            if dep.handler == remove.prune_lstm_out_channels:
                return None
            known = coupled.get((dep.target, dep.handler), {})
            pairs = [(idx, known[idx]) for idx in idxs if idx in known]
            for axis in self._axes(dep) if pairs else ():
                channels = _channels(axis, pairs, dep)
                removed.setdefault(id(axis.weight), []).append((axis, channels))
        if not removed:
            return None
        squared_norm = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for weight, axes in removed.items():
            _add(squared_norm, self._scores[weight], axes)
        first = coupled[root.target, root.handler]
        return self._normalized(squared_norm[[first[idx] for idx in group[0].idxs]])

    def _axes(self, dep: Any) -> list[_ChannelAxis]:
        """Returns the axes of weights that a pruning function removes channels from."""
        module, axes_of = dep.target.module, _AXES.get(dep.handler)
        if axes_of is not None:
            axes = [axis for axis in axes_of(module) if axis.weight is not None]
            unknown = any(id(axis.weight) not in self._scores for axis in axes)
        else:  # a norm, an operation; a customized pruner, or a parameter that is a layer
            weights = [module] if isinstance(module, Tensor) else list(module.parameters())
            axes, unknown = [], any(id(weight) in self._scores for weight in weights)
        if unknown:
            raise LapValueError(
                "weights that are layers of the traced model, in modules whose channels "
                "Torch-Pruning itself removes",
                dep.target.name,
                "Pass the model that the pruner has; undo parametrizations; list a module that has "
                "a customized pruner in ignored_layers.",
            )
        return axes

    def _refresh(self, root: Any) -> None:
        """Scores the model anew if it has changed or the group of a root is requested again.

        A pruner requests each group once a step: the second request begins a new pass, also where
        weights have changed in ways that PyTorch does not count (through .data).
        """
        tensors = [*self._model.parameters(), *self._model.buffers()]
        now = [(x, -1 if x.is_inference() else x._version) for x in tensors]
        same = len(now) == len(self._scored) and all(
            old() is x and before == version
            for (old, before), (x, version) in zip(self._scored, now, strict=True)
        )
        if not same or root in self._roots:
            shapes = {name: weight.shape for name, weight in self._model.named_parameters()}
            if self._topology is None or shapes != self._shapes:
                self._topology, self._shapes = self._traced(), shapes
            scores = lap_ext.scores(
                self._model,
                topology=self._topology,
                layers=list(self._topology.layers),
                **self._scoring,
            )
            layers = self._topology.layers
            self._scores = {
                id(layers[name].weight): x
                for name, x in scores.items()
                if layers[name].pruned_by != "mask"  # a computed weight is another tensor each time
            }
            self._scored = [(weakref.ref(x), version) for x, version in now]
            self._roots = set()
        self._roots.add(root)

    def _traced(self) -> lap_ext.Topology:
        try:
            return lap_ext.trace(self._model, self._example, **self._tracing)
        except TopologyError as error:
            if self._topology is None:
                raise
            hint = (
                "If the pruned model has hard-coded sizes (the number of heads, a reshape), "
                "correct them first."
            )
            raise TopologyError(
                error.expected,
                error.got,
                f"{error.cure} {hint}".strip(),
                argument=error.argument,
                layer=error.layer,
            ) from error

    def _normalized(self, importance: Tensor) -> Tensor:
        """Applies the normalizer to a group's importance."""
        normalizer = self._group_magnitude.normalizer
        if callable(normalizer):
            with callback():
                return normalizer(importance)
        if normalizer is None or not bool((importance > 0).any()):
            return importance
        scaled = importance / importance.max()  # so that the 1e-8 that Torch-Pruning adds is small
        if normalizer == "lamp":  # which Torch-Pruning computes in float32
            scaled = scaled.float()
        result: Tensor = self._group_magnitude._normalize(scaled, normalizer)
        return result


class _ChannelAxis(NamedTuple):
    """An axis of a weight, seen as [groups, rows, cols, window], that has channels.

    axis 1: a channel is a row, 2: a column. each: every group has channels of its own, numbered
    consecutively; else a channel lies in all of them.
    """

    weight: Tensor
    axis: int
    groups: int = 1
    each: bool = True


def _conv(module: Any, axis: int) -> list[_ChannelAxis]:
    return [_ChannelAxis(module.weight, 3 - axis if module.transposed else axis, module.groups)]


def _attention(module: Any) -> list[_ChannelAxis]:
    """Returns the axes of a MultiheadAttention: inputs, queries, keys, values and outputs."""
    packed, out = module.in_proj_weight, module.out_proj.weight
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    both = [_ChannelAxis(packed, axis, 3, each=False) for axis in (1, 2)]
    return [
        *both,
        *(_ChannelAxis(w, 1) for w in separate),
        _ChannelAxis(out, 1),
        _ChannelAxis(out, 2),
    ]


def _lstm_inputs(module: Any) -> list[_ChannelAxis]:
    sides = ("", "_reverse") if module.bidirectional else ("",)
    return [_ChannelAxis(getattr(module, f"weight_ih_l0{side}"), 2) for side in sides]


_AXES: dict[Any, Callable[[Any], list[_ChannelAxis]]] = {
    remove.prune_linear_out_channels: lambda module: [_ChannelAxis(module.weight, 1)],
    remove.prune_linear_in_channels: lambda module: [_ChannelAxis(module.weight, 2)],
    remove.prune_conv_out_channels: lambda module: _conv(module, 1),
    remove.prune_conv_in_channels: lambda module: _conv(module, 2),
    remove.prune_depthwise_conv_out_channels: lambda module: _conv(module, 1),
    remove.prune_embedding_out_channels: lambda module: [_ChannelAxis(module.weight, 2)],
    remove.prune_multihead_attention_out_channels: _attention,
    remove.prune_lstm_in_channels: _lstm_inputs,
}


class _Index(NamedTuple):
    """An index as Torch-Pruning's mappings take it."""

    idx: int
    root_idx: int | None


def _root_channels(group: Any) -> dict[tuple[Any, Any], dict[int, int]]:
    """Maps (node, pruning function) to {channel: index of the root channel that it goes with}.

    Follows the dependencies as `get_pruning_group` does. A group names one root channel for each
    of its channels; where two lead to it, neither can be removed alone, and here both are the first
    (union-find).
    """
    parent: dict[int, int] = {}  # index -> an earlier one that it is coupled with, or itself

    def first(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    coupled: dict[tuple[Any, Any], dict[int, int]] = {}
    root = group[0].dep
    start = [_Index(idx, index) for index, idx in enumerate(group[0].idxs)]
    parent.update((index, index) for index in range(len(start)))
    pending: list[tuple[Any, Any, Sequence[Any]]] = [(root.target, root.handler, start)]
    while pending:
        node, handler, pairs = pending.pop()
        known = coupled.setdefault((node, handler), {})
        fresh = []
        for pair in pairs:
            if pair.root_idx is None:
                continue  # shared by several
            if pair.idx not in known:
                known[pair.idx] = pair.root_idx
                fresh.append(pair)
            else:
                one, other = first(known[pair.idx]), first(pair.root_idx)
                parent[max(one, other)] = min(one, other)
        for dep in node.dependencies if fresh else ():
            if dep.is_triggered_by(handler):
                mapped = fresh
                for mapping in dep.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                pending.append((dep.target, dep.handler, mapped))
    return {
        key: {idx: first(index) for idx, index in known.items()} for key, known in coupled.items()
    }


def _channels(channel_axis: _ChannelAxis, pairs: Sequence[tuple[int, int]], dep: Any) -> Tensor:
    """Returns the root's channel that each row or column goes with, -1: none.

    int64 [groups, rows, 1] or [groups, 1, cols]; one group where a channel lies in all of them.
    """
    weight, axis, groups, each = channel_axis
    size = weight.shape[0] // groups if axis == 1 else weight.shape[1]
    count = size * groups if each else size
    idxs, roots = zip(*pairs, strict=True)
    if max(idxs) >= count:
        raise LapValueError(
            f"a group of the model as it is now ({dep.target.name} has {count} channels)",
            f"index {max(idxs)}",
            "Make a new group after each pruning, and a new pruner if the model splits channels "
            "(Torch-Pruning 1.6.1 keeps the old indices).",
        )
    channels = torch.full((count,), -1)
    channels[list(idxs)] = torch.tensor(roots)
    return channels.reshape(-1, size, 1) if axis == 1 else channels.reshape(-1, 1, size)


def _add(squared_norm: Tensor, scores: Tensor, axes: Sequence[tuple[_ChannelAxis, Tensor]]) -> None:
    """Adds the squares of a weight's scores to the squared norms of its channels, each once."""
    groups = axes[0][0].groups
    split = scores.reshape(groups, scores.shape[0] // groups, scores.shape[1], -1)
    squares = split.double().square_().sum(3)  # [groups, rows, cols]
    counted: list[Tensor] = []
    for channel_axis, channels in axes:
        left = squares
        for earlier in counted:
            left = left.masked_fill((earlier == channels).to(left.device), 0.0)
        counted.append(channels)
        sums = left.sum(3 - channel_axis.axis, keepdim=True).cpu()
        if channels.shape[0] == 1:
            sums = sums.sum(0, keepdim=True)
        squared_norm.index_add_(0, channels[channels >= 0], sums[channels >= 0])


def _check_normalizer(importance: Any) -> None:
    """Checks the normalizer now: Torch-Pruning itself raises only when it is used."""
    if callable(importance.normalizer):
        return
    try:
        importance._normalize(torch.ones(2), importance.normalizer)
    except (NotImplementedError, AttributeError, ValueError, IndexError):
        raise LapValueError(
            "{argument} to be 'mean', 'sum', 'max', 'gaussian', 'standarization', "
            "'sentinel_<fraction>', 'lamp' (as Torch-Pruning spells them), a function or None",
            repr(importance.normalizer),
            argument="normalizer",
        ) from None
