# SPDX-License-Identifier: MIT
"""Statistics of activations per channel, in float64, accumulated batch by batch.

    mean_squares       input i of a role: mean of x_i^2 over batch and positions
    absolute_means     input i of a role: root of the sum over elements of (mean of |x_i|)^2
    active_fractions   output o of a role: the fraction > 0 after its activation function

An embedding reads one-hot rows: the mean square of an entry is its frequency. Experts that
are chosen by the data count only the rows routed to them (experts.py); an expert without rows has
statistics 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lap_ext.criteria.statistics.activity import Activation, activation_after
from lap_ext.criteria.statistics.experts import Chosen, chosen_by_data, tensors_of
from lap_ext.criteria.statistics.replay import Watches, elements, replay
from lap_ext.errors import LapValueError
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology import Topology
from lap_ext.topology.call import bind
from lap_ext.topology.roles import Role

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


Map = Callable[[Tensor], Tensor]  # of entries, float64


@dataclass
class _Mean:
    """A running mean per channel, float64."""

    total: Tensor | None = None  # [channels]
    count: Tensor | int = 0  # of positions, over all batches; [channels] where they differ

    def add(self, total: Tensor, count: Tensor | int) -> None:
        """Adds the sums of one batch."""
        self.total = total if self.total is None else self.total + total
        self.count += count

    def value(self, channels: int) -> Tensor:
        """Returns the mean on the CPU, [channels]; zeros where nothing was counted."""
        if self.total is None:
            return torch.zeros(channels, dtype=torch.float64)
        mean = self.total.cpu() / torch.as_tensor(self.count).cpu().clamp(min=1)
        return mean.repeat(channels // mean.numel())


class _SquaredMeans(_Mean):
    """The sum over runs of the squared mean of each, per channel, float64."""

    def add(self, total: Tensor, count: Tensor | int) -> None:
        """Adds what one run has summed."""
        squared = (total / torch.as_tensor(count).to(total.device).clamp(min=1)).square()
        self.total, self.count = squared if self.total is None else self.total + squared, 1


def mean_squares(topology: Topology, data: Any) -> list[Tensor]:
    """Computes the mean of x_i^2 for every role, float64 [I], on the CPU.

    Args:
        topology: of the model.
        data: batches as `replay` takes them.

    Raises:
        ValueError: an activation is not finite; data is empty, or takes another path through the
            model than the trace.
    """
    return _of_inputs(topology, data, _Mean, torch.square)


def absolute_means(topology: Topology, data: Any) -> list[Tensor]:
    """Computes a_i = sqrt(sum over elements of (mean of |x_i|)^2) for every role, float64 [I].

    The mean is over all positions of an element, or, of an expert chosen by data, over those of its
    tokens. Elements are run one by one (see `elements`), so that it does not matter how data is cut
    into batches, nor where a model puts the dimension of the batch.

    Args:
        topology: of the model.
        data: batches as `replay` takes them.

    Raises:
        ValueError: as in `mean_squares`.
    """
    sums = _of_inputs(topology, elements(topology.model, data), _SquaredMeans, torch.abs)
    return [exact_sqrt(x) for x in sums]


def _of_inputs(topology: Topology, data: Any, kind: type[_Mean], of: Map) -> list[Tensor]:
    """Computes means over the inputs of every role, on the CPU, and checks that they are finite."""
    roles = topology.roles
    means = [kind() for _ in roles]
    _check_no_projection(roles)

    def watcher(_program: ExportedProgram, nodes: list[fx.Node]) -> Watches:
        indices_of: dict[fx.Node, list[int]] = {}
        for index, node in enumerate(nodes):
            indices_of.setdefault(node, []).append(index)
        before = {}
        for node, indices in indices_of.items():
            chosen = Chosen(node) if chosen_by_data(roles[indices[0]]) else None
            before[node] = _adder(roles, means, node, indices, chosen, of)
            before.update(chosen.watches() if chosen else {})
        return Watches(before)

    replay(topology, data, watcher)
    result = []
    for role, mean in zip(roles, means, strict=True):
        values = mean.value(role.part.channels[0])
        if not bool(values.isfinite().all()):
            raise LapValueError(
                "finite activations",
                f"inf or NaN in the input of layer {role.layer!r}",
                "Look for such values in data.",
            )
        result.append(values)
    return result


def active_fractions(topology: Topology, data: Any) -> list[Tensor | None]:
    """Computes how often each output of every role is > 0 after its activation function.

    Args:
        topology: of the model.
        data: batches as `replay` takes them.

    Returns:
        Float64 [O] on the CPU; None where no activation function follows before the next weighted
        layer or join, and for recurrent layers.
    """
    roles = topology.roles
    means: list[_Mean | None] = [None for _ in roles]

    def watcher(program: ExportedProgram, nodes: list[fx.Node]) -> Watches:
        after = {}
        for index, (role, node) in enumerate(zip(roles, nodes, strict=True)):
            follows = None if role.kind in _RECURRENT else activation_after(program, node)
            if follows is None:
                continue
            mean = means[index] = means[index] or _Mean()
            after[follows.node] = _active_counter(mean, follows, role.out_dims)
        return Watches(after=after)

    replay(topology, data, watcher)
    return [
        None if mean is None else mean.value(role.part.channels[1])
        for role, mean in zip(roles, means, strict=True)
    ]


def _check_no_projection(roles: list[Role]) -> None:
    for role in roles:
        if role.kind == "lstm" and role.layer.rpartition(".")[2].startswith("weight_hr"):
            raise LapValueError(
                "recurrent layers without proj_size (inputs of projections are not observed)",
                repr(role.layer),
                "Use a criterion that needs no data, or exclude the layer.",
            )


def _adder(
    roles: list[Role],
    means: list[_Mean],
    node: fx.Node,
    indices: list[int],
    chosen: Chosen | None,
    of: Map,
) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
    """Makes the watch that adds a map of the inputs of a node's roles to their means."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bind(node, args, kwargs)
        if roles[indices[0]].kind in _RECURRENT:
            for index, x in zip(indices, _cell_inputs(call.target, call.arguments), strict=True):
                means[index].add(*_sums(of(x.double()), (2,)))
            return
        (index,) = indices
        role = roles[index]
        x = tensors_of(call)[role.x]
        if role.kind == "embedding":
            size = role.part.channels[0]
            entries = x.flatten().long() % size
            means[index].add(torch.bincount(entries, minlength=size).double(), entries.numel())
        elif chosen is not None:
            means[index].add(*chosen.sums(call, x, role, of))
        else:
            means[index].add(*_sums(of(x.double()), role.in_dims))

    return read


def _sums(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, int]:
    """Returns (sum of each channel, float64; positions); the channels lie along dims."""
    rest = [dim for dim in range(x.dim()) if dim not in dims]
    sums = x.sum(rest, dtype=torch.float64) if rest else x.double()
    order = [sorted(dims).index(dim) for dim in dims]
    sums = sums.permute(order).flatten()
    return sums, x.numel() // max(sums.numel(), 1)


def _active_counter(
    mean: _Mean, follows: Activation, dims: tuple[int, ...]
) -> Callable[[Any], None]:
    """Makes the watch that counts the active outputs of an activation function."""
    index = follows.channels(dims)

    def count(result: Any) -> None:
        y = result[0] if isinstance(result, (tuple, list)) else result
        active = y > 0
        if index is None:
            mean.add(*_sums(active, dims))
            return
        channels = index.to(y.device)
        size = int(index.max()) + 1
        sums = torch.bincount(channels[active], minlength=size).double()
        mean.add(sums, y.numel() // size)

    return count


def _cell_inputs(layer: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    """Computes the input of each weight of a recurrent layer, [time, batch, features], in order.

    Runs layers and directions one by one: weight_ih reads the layer's input, weight_hh the state of
    the previous time step.
    """
    sides = 2 if given["bidirectional"] else 1
    cells = given["num_layers"] * sides
    params = list(given["params"])
    per_cell = len(params) // cells
    start = given["hx"]
    states = list(start) if isinstance(start, (list, tuple)) else [start]
    x = given["input"].transpose(0, 1) if given["batch_first"] else given["input"]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for cell in range(cells):
        own = params[cell * per_cell : (cell + 1) * per_cell]
        backward = cell % sides == 1
        first = [state[cell : cell + 1] for state in states]
        hx = first if isinstance(start, (list, tuple)) else first[0]
        steps = x.flip(0) if backward else x
        out = layer(steps, hx, own, given["has_biases"], 1, 0.0, False, False, False)[0]
        inputs += [steps, torch.cat([first[0], out[:-1]])]
        outputs.append(out.flip(0) if backward else out)
        if len(outputs) == sides:
            x, outputs = torch.cat(outputs, dim=2), []
    return inputs
