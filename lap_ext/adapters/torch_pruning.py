# SPDX-License-Identifier: MIT
"""Lookahead scores in Torch-Pruning: an importance for whole channels, through residuals and concats.

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

Which weights go with a channel is what Torch-Pruning will remove: in a layer that makes the channel
its row, in a layer that reads it its columns, in all layers of the group. What each of them is worth
is what lap_ext finds in a trace of its own. A weight in both a row and a column of the same channel
(of a layer whose input is added to its output), or one that two modules share, counts once. Batch
norms count as factors of their neighbors' scores and have no energy of their own.

Channels that cannot be removed without each other (the two halves of a gated layer) all get what
they cost together. A weight that Torch-Pruning assigns to no single channel (the keys and values
that several query heads share) does not count.

Scores are computed anew for each pass over the groups: after training, and after channels are gone,
when the model is traced again. A model that has sizes written down (the number of heads, a reshape)
must have them put right before the next step, as before any other use of it. Where channels are
split (chunk) Torch-Pruning 1.6.1 itself needs a new pruner for each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lap_ext

try:
    import torch_pruning as tp
    from torch_pruning.pruner import function as remove
except ImportError as error:
    raise ModuleNotFoundError(
        "lap_ext.adapters.torch_pruning: expected the torch-pruning package (1.6 or later), got "
        f"none that can be imported ({error}). Run: pip install torch-pruning",
        name="torch_pruning",
    ) from error
if not hasattr(tp.pruner, "BasePruner"):
    raise ImportError(
        "lap_ext.adapters.torch_pruning: expected torch-pruning 1.6 or later (it has BasePruner), "
        "got an older one. Run: pip install -U torch-pruning"
    )

_TRACE = ("kwargs", "neighbors", "unknown")  # the options of scores that are trace's
_OWN = ("exclude", "masks")  # those that mean nothing where channels are removed


class LookaheadImportance(tp.importance.Importance):
    """The lookahead energy of the channels of a group, for the pruners of Torch-Pruning.

        importance[c] = sum of score(w)^2 over the weights w that are removed with channel c

    Args:
        model: the model that the pruner prunes.
        example_inputs: as in `lap_ext.trace`, or a dict of named arguments, as Torch-Pruning has it.
        normalizer: what makes groups comparable where a pruner ranks them together
            (global_pruning): any that Torch-Pruning's GroupMagnitudeImportance takes ("mean",
            "sum", "max", "lamp", ..., a function). None: the formula itself.
        options: criterion, normalize, bn, skip, data, kwargs, neighbors and unknown, as in
            `lap_ext.scores`. data is read once a pass: pass a list, not a generator.

    Raises:
        TypeError: model is not a module; an option that means nothing here.
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

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "LookaheadImportance: expected model to be a torch.nn.Module, got "
                f"{type(model).__name__}."
            )
        for name in _OWN:
            if name in options:
                raise TypeError(
                    f"LookaheadImportance: expected no {name} (channels are removed in all layers "
                    "of their group), got one. Use the pruner's ignored_layers."
                )
        self._host = tp.importance.GroupMagnitudeImportance(normalizer=normalizer)
        _check_normalizer(self._host)
        self._trace_options = {name: options.pop(name) for name in _TRACE if name in options}
        self._options = options
        self._model = model
        self._example = example_inputs
        self._topology: lap_ext.Topology | None = None
        self._shapes: dict[str, torch.Size] = {}  # of the parameters when it was traced
        self._scores: dict[int, Tensor] = {}  # id of a parameter -> scores
        self._seen: list[tuple[Any, int]] = []  # tensors that they are of, and their versions
        self._roots: set[Any] = set()  # of the groups asked for since

    def __call__(self, group: Any) -> Tensor | None:
        """The importance of the channels of a group.

        Args:
            group: of a `DependencyGraph` of the model as it is now, all of a layer's channels or
                some.

        Returns:
            A number >= 0 for each index of the group's root, in their order, float64 on the CPU;
            with a normalizer, what that makes of them. None, as Torch-Pruning has it, for what is
            not to be pruned: no weights in the group, or outputs of an LSTM, which Torch-Pruning
            1.6.1 cannot remove.

        Raises:
            TopologyError: the model cannot be traced.
            ValueError: the group is another model's or older than the last pruning; the weights of
                a module that has a pruner of its own.
        """
        root = group[0].dep
        self._refresh((root.target.module, root.handler))
        classes = _classes(group)
        found: dict[int, list[tuple[_Place, Tensor]]] = {}  # id of a weight -> places and channels
        for dep, idxs in group.items:
            if dep.handler == remove.prune_lstm_out_channels:
                return None
            known = classes.get((dep.target, dep.handler), {})
            pairs = [(idx, known[idx]) for idx in idxs if idx in known]
            for place in self._places(dep) if pairs else ():
                found.setdefault(id(place.weight), []).append((place, _channels(place, pairs, dep)))
        if not found:
            return None
        energy = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for weight, places in found.items():
            _add(energy, self._scores[weight], places)
        first = classes[root.target, root.handler]
        return self._normalized(energy[[first[idx] for idx in group[0].idxs]])

    def _places(self, dep: Any) -> list[_Place]:
        """The weights that a pruning function takes channels from."""
        module, find = dep.target.module, _PLACES.get(dep.handler)
        if find is not None:
            places = [place for place in find(module) if place.weight is not None]
            strange = any(id(place.weight) not in self._scores for place in places)
        else:  # a norm, an operation; a pruner of the user's, or a parameter that is a layer
            weights = [module] if isinstance(module, Tensor) else list(module.parameters())
            places, strange = [], any(id(weight) in self._scores for weight in weights)
        if strange:
            raise ValueError(
                "LookaheadImportance: expected weights that are layers of the traced model, in "
                f"modules whose channels Torch-Pruning itself removes, got {dep.target.name}. Pass "
                "the model that the pruner has; undo parametrizations; leave a module that has a "
                "pruner of its own out with ignored_layers."
            )
        return places

    def _refresh(self, root: Any) -> None:
        """Scores of the model as it is, if it has changed or a group is asked for again.

        A pruner asks for each group once a step: the second time begins a new pass, also where
        weights have changed in ways that PyTorch does not count (through .data).
        """
        tensors = [*self._model.parameters(), *self._model.buffers()]
        now = [(x, -1 if x.is_inference() else x._version) for x in tensors]
        same = len(now) == len(self._seen) and all(
            old() is x and before == version
            for (old, before), (x, version) in zip(self._seen, now, strict=True)
        )
        if not same or root in self._roots:
            shapes = {name: weight.shape for name, weight in self._model.named_parameters()}
            if self._topology is None or shapes != self._shapes:
                self._topology, self._shapes = self._traced(), shapes
            scores = lap_ext.scores(self._model, self._topology, **self._options)
            layers = self._topology.layers
            self._scores = {id(layers[name].weight): found for name, found in scores.items()}
            self._seen = [(weakref.ref(x), version) for x, version in now]
            self._roots = set()
        self._roots.add(root)

    def _traced(self) -> lap_ext.Topology:
        example, options = self._example, dict(self._trace_options)
        if isinstance(example, Mapping):
            options["kwargs"] = {**example, **options.get("kwargs", {})}
            example = ()
        try:
            return lap_ext.trace(self._model, example, **options)
        except lap_ext.TopologyError as error:
            if self._topology is None:
                raise
            raise lap_ext.TopologyError(
                f"LookaheadImportance: expected the pruned model to run, got {error} If it has "
                "sizes written down (the number of heads, a reshape), put them right first."
            ) from error

    def _normalized(self, found: Tensor) -> Tensor:
        """What the normalizer makes of a group's importance."""
        normalizer = self._host.normalizer
        if callable(normalizer):
            return normalizer(found)
        if normalizer is None or not bool((found > 0).any()):
            return found
        scaled = found / found.max()  # Torch-Pruning adds 1e-8, which is to be small
        if normalizer == "lamp":  # which it computes in float32
            scaled = scaled.float()
        result: Tensor = self._host._normalize(scaled, normalizer)
        return result


class _Place(NamedTuple):
    """Where channels lie in a weight, seen as [groups, rows, cols, window].

    axis 1: a channel is a row, 2: a column. each: every group has channels of its own, numbered
    through; else a channel lies in all of them.
    """

    weight: Tensor
    axis: int
    groups: int = 1
    each: bool = True


def _conv(module: Any, axis: int) -> list[_Place]:
    return [_Place(module.weight, 3 - axis if module.transposed else axis, module.groups)]


def _attention(module: Any) -> list[_Place]:
    """MultiheadAttention: a channel is one of its inputs, of its queries, keys, values, outputs."""
    packed, out = module.in_proj_weight, module.out_proj.weight
    apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    both = [_Place(packed, axis, 3, each=False) for axis in (1, 2)]
    return [*both, *(_Place(w, 1) for w in apart), _Place(out, 1), _Place(out, 2)]


def _lstm_inputs(module: Any) -> list[_Place]:
    sides = ("", "_reverse") if module.bidirectional else ("",)
    return [_Place(getattr(module, f"weight_ih_l0{side}"), 2) for side in sides]


_PLACES: dict[Any, Callable[[Any], list[_Place]]] = {
    remove.prune_linear_out_channels: lambda module: [_Place(module.weight, 1)],
    remove.prune_linear_in_channels: lambda module: [_Place(module.weight, 2)],
    remove.prune_conv_out_channels: lambda module: _conv(module, 1),
    remove.prune_conv_in_channels: lambda module: _conv(module, 2),
    remove.prune_depthwise_conv_out_channels: lambda module: _conv(module, 1),
    remove.prune_embedding_out_channels: lambda module: [_Place(module.weight, 2)],
    remove.prune_multihead_attention_out_channels: _attention,
    remove.prune_lstm_in_channels: _lstm_inputs,
}


class _Index(NamedTuple):
    """An index as Torch-Pruning's mappings take it."""

    idx: int
    root_idx: int | None


def _classes(group: Any) -> dict[tuple[Any, Any], dict[int, int]]:
    """(node, pruning function) -> its channels -> the place among the root's that they go with.

    Follows the dependencies as `get_pruning_group` does. A group names one root channel for each
    of its channels; where two lead to it, neither can be removed alone, and here both are the first.
    """
    first: dict[int, int] = {}  # place -> an earlier one that it is coupled with, or itself

    def settled(place: int) -> int:
        while first[place] != place:
            place = first[place]
        return place

    found: dict[tuple[Any, Any], dict[int, int]] = {}
    root = group[0].dep
    start = [_Index(idx, place) for place, idx in enumerate(group[0].idxs)]
    first.update((place, place) for place in range(len(start)))
    todo: list[tuple[Any, Any, Sequence[Any]]] = [(root.target, root.handler, start)]
    while todo:
        node, handler, pairs = todo.pop()
        known = found.setdefault((node, handler), {})
        fresh = []
        for pair in pairs:
            if pair.root_idx is None:
                continue  # shared by several
            if pair.idx not in known:
                known[pair.idx] = pair.root_idx
                fresh.append(pair)
            else:
                one, other = settled(known[pair.idx]), settled(pair.root_idx)
                first[max(one, other)] = min(one, other)
        for dep in node.dependencies if fresh else ():
            if dep.is_triggered_by(handler):
                mapped = fresh
                for mapping in dep.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                todo.append((dep.target, dep.handler, mapped))
    return {
        key: {idx: settled(place) for idx, place in known.items()} for key, known in found.items()
    }


def _channels(place: _Place, pairs: Sequence[tuple[int, int]], dep: Any) -> Tensor:
    """The root's channel that each row or column goes with, -1: none.

    int64 [groups, rows, 1] or [groups, 1, cols]; one group where a channel lies in all of them.
    """
    weight, axis, groups, each = place
    size = weight.shape[0] // groups if axis == 1 else weight.shape[1]
    count = size * groups if each else size
    idxs, roots = zip(*pairs, strict=True)
    if max(idxs) >= count:
        raise ValueError(
            f"LookaheadImportance: expected a group of the model as it is now ({dep.target.name} has "
            f"{count} channels), got index {max(idxs)}. Make a new group after each pruning, and a "
            "new pruner if the model splits channels (Torch-Pruning 1.6.1 keeps the old places)."
        )
    channels = torch.full((count,), -1)
    channels[list(idxs)] = torch.tensor(roots)
    return channels.reshape(-1, size, 1) if axis == 1 else channels.reshape(-1, 1, size)


def _add(energy: Tensor, scores: Tensor, places: Sequence[tuple[_Place, Tensor]]) -> None:
    """Adds the squares of a weight's scores to the energy of the channels that they go with."""
    groups = places[0][0].groups
    split = scores.reshape(groups, scores.shape[0] // groups, scores.shape[1], -1)
    squares = split.double().square_().sum(3)  # [groups, rows, cols]
    counted: list[Tensor] = []
    for place, channels in places:
        left = squares
        for earlier in counted:
            left = left.masked_fill((earlier == channels).to(left.device), 0.0)
        counted.append(channels)
        sums = left.sum(3 - place.axis, keepdim=True).cpu()
        if channels.shape[0] == 1:
            sums = sums.sum(0, keepdim=True)
        energy.index_add_(0, channels[channels >= 0], sums[channels >= 0])


def _check_normalizer(host: Any) -> None:
    """Torch-Pruning finds out when it is used."""
    if callable(host.normalizer):
        return
    try:
        host._normalize(torch.ones(2), host.normalizer)
    except (NotImplementedError, AttributeError, ValueError, IndexError):
        raise ValueError(
            "LookaheadImportance: expected normalizer to be 'mean', 'sum', 'max', 'gaussian', "
            "'standarization', 'sentinel_<fraction>', 'lamp' (as Torch-Pruning spells them), a "
            f"function or None, got {host.normalizer!r}."
        ) from None
