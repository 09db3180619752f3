# SPDX-License-Identifier: MIT
"""LSTM, GRU and plain RNN layers: row j of every gate of both weights feeds state channel j.

    state j: parents weight_ih[g * H + j] and weight_hh[g * H + j] for all gates g
    weight_hh reads the state itself: the state's consumers are weight_hh and what follows

One gate multiplies what another one adds: linearized at 1, both are parents, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.channels import ChannelEdges, Trail
from lap_ext.topology.noting import belong
from lap_ext.topology.roles import Part
from lap_ext.topology.rules.routing import role_of
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(t: Tracer, call: Call) -> Result:
    if call.get("input") is None or call.get("batch_first") is None:
        return t.unknown(call)  # packed sequences
    x, layers = call["input"], call["num_layers"]
    directions = 2 if call["bidirectional"] else 1
    weights = [p for p in call["params"] if len(p.shape) == 2]
    if any(w.view is None for w in weights):
        return t.unknown(call)
    biases = [p for p in call["params"] if len(p.shape) == 1]
    per_cell = len(weights) // (layers * directions)
    starts = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    inputs = channel_ids.pairs_along(x.ids, 2, x.shape[2])
    finals: tuple[list[Tensor], list[Tensor]] = ([], [])  # of the outputs, of an LSTM's cells
    sides: list[Tensor] = []
    for layer in range(layers):
        sides = []
        for direction in range(directions):
            cell = layer * directions + direction
            own = weights[cell * per_cell : (cell + 1) * per_cell]
            trail = x.trail if layer == 0 else ()
            first = len(t.roles)
            state, inner = _cell(t, call, own, inputs, trail, starts, cell)
            for role, bias in zip(t.roles[first : first + 2], biases[2 * cell :], strict=False):
                belong(t, bias, role.out.ids, adds=True)
            sides.append(state)
            finals[0].append(state)
            finals[1].append(inner)
        joined = torch.cat(sides)
        inputs = torch.arange(joined.numel()), joined
    outputs = torch.cat(sides).reshape(1, 1, -1)
    result = [Value(call.shapes[0], outputs, trail=(call.name,))]
    for shape, states in zip(call.shapes[1:], finals, strict=False):
        result.append(Value(shape, torch.stack(states).unsqueeze(1), trail=(call.name,)))
    return result


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _step(t: Tracer, call: Call) -> Result:
    """Handles one step of a layer: what it makes is read by the next step, not by itself."""
    x, weights = call["input"], [call["w_ih"], call["w_hh"]]
    if any(w.view is None for w in weights):
        return t.unknown(call)
    hx = call["hx"]
    states = [_given(t, h) for h in (hx if isinstance(hx, (list, tuple)) else [hx])]
    hidden = weights[1].shape[1]
    reads = [channel_ids.pairs_along(ids, ids.dim() - 1, hidden) for ids in states]
    inputs = channel_ids.pairs_along(x.ids, x.ids.dim() - 1, x.shape[-1])
    positions = math.prod(x.shape[:-1])
    roles = [
        role_of(t, call, w.view.parameter, Part(w.shape), given, call.name, positions)
        for w, given in zip(weights, (inputs, reads[0]), strict=True)
    ]
    roles[0].trail = x.trail
    for role, bias in zip(roles, ("b_ih", "b_hh"), strict=True):
        belong(t, call.get(bias), role.out.ids, adds=True)

    def state(first: int, end: int, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        child = torch.arange(first, end) % hidden  # rows of the gates
        edges = [ChannelEdges(child, role.out.ids[first:end]) for role in roles]
        edges += [ChannelEdges(*pairs) for pairs in kept]
        return t.channels.add(hidden, "state", call.name, edges).ids

    gates = weights[0].shape[0]
    if call.name == "lstm_cell":  # input, forget and cell gates make the cell, which output reads
        inner = state(0, gates - hidden, reads[1:])
        made = [state(gates - hidden, gates, [(torch.arange(hidden), inner)]), inner]
    else:
        made = [state(0, gates, reads if call.name == "gru_cell" else [])]
    results = [
        Value(shape, ids.reshape([1] * (len(shape) - 1) + [hidden]), trail=(call.name,))
        for ids, shape in zip(made, call.shapes, strict=True)
    ]
    return results if len(results) > 1 else results[0]


def _given(t: Tracer, state: Value) -> Tensor:
    """Returns the ids of the state before a step; a first state of zeros counts as zero."""
    constant = None if state.has_channels else t.constant(state)
    if constant is None or bool(constant.any()):
        return state.ids
    return torch.full_like(state.ids, t.channels.zero())


def _cell(
    t: Tracer,
    call: Call,
    weights: list[Value],
    inputs: Any,
    trail: Trail,
    starts: Sequence[Any],
    cell: int,
) -> tuple[Tensor, Tensor]:
    """Adds one layer and direction: [w_ih, w_hh] or [w_ih, w_hh, w_hr].

    Returns:
        The ids of its output and of its cell, which differ only where w_hr projects the output.
    """
    nothing = (torch.zeros(0, dtype=torch.int64),) * 2
    roles = []
    positions = math.prod(call.shape[:-1])
    for index, weight in enumerate(weights):
        assert weight.view is not None
        part = Part(weight.shape)
        given = inputs if index == 0 else nothing
        role = role_of(t, call, weight.view.parameter, part, given, call.name, positions)
        roles.append(role)
    roles[0].trail = trail
    hidden = weights[1].shape[1] if len(weights) == 2 else weights[2].shape[1]
    gates = weights[0].shape[0] // hidden
    child = torch.arange(hidden).repeat(gates)
    edges = [ChannelEdges(child, role.out.ids) for role in roles[:2]]
    carried = starts[:1] if call.name == "gru" else starts[1:]  # first states that are kept in part
    edges += [ChannelEdges(*_first(x, cell, hidden)) for x in carried]
    state = inner = t.channels.add(hidden, "state", call.name, edges).ids
    if len(weights) == 3:  # an LSTM's projection of the state
        roles[2].inputs = torch.arange(hidden), state
        state = roles[2].out.ids
    more, first = _first(None if call.name == "gru" else starts[0], cell, state.numel())
    roles[1].inputs = (
        torch.cat([torch.arange(state.numel()), more]),
        torch.cat([state, first]),
    )
    return state, inner


def _first(start: Any, cell: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns (index, id) pairs of a first state [cells, batch, size] if it is computed."""
    if not isinstance(start, Value) or not start.has_channels:
        return (torch.zeros(0, dtype=torch.int64),) * 2
    ids = start.ids[cell if start.ids.shape[0] > 1 else 0]  # [batch or 1, size]
    return channel_ids.pairs_along(ids, 1, size)
