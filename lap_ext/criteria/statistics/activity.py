# SPDX-License-Identifier: MIT
"""Finds the activation function after a weighted operation, and the channel of its elements.

The path from the operation to the activation may go through norms, dropout, pooling, sums and
products with parameters and numbers, and operations that only move data. It ends where channels are
joined, split or weighted and where a result is used twice; then no activation function follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lap_ext.topology.call import operation_name

ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise"),
    *("gelu", "silu", "mish", "elu", "selu", "celu", "hardswish", "softplus", "sigmoid", "tanh"),
    *("hardtanh", "hardsigmoid", "hardshrink", "softshrink", "threshold"),
    *("log_sigmoid", "log_sigmoid_forward", "clamp", "clamp_min"),
}
_SAME = {
    *("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "layer_norm"),
    *("native_layer_norm", "group_norm", "native_group_norm", "instance_norm", "rms_norm"),
    *("_fused_rms_norm", "dropout", "feature_dropout", "alpha_dropout", "native_dropout", "clone"),
    *("contiguous", "to", "_to_copy", "alias", "detach"),
}
_SCALED = {"add", "sub", "mul", "div"}  # with a parameter or a number
_POOLS = {
    f"{kind}_pool{n}d"
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "_adaptive_avg")
    for n in (1, 2, 3)
} | {f"max_pool{n}d_with_indices" for n in (2, 3)}
_MOVES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t",
          "squeeze", "unsqueeze", "movedim", "swapaxes", "pixel_shuffle"}  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """An activation function and the moves between it and the operation it follows."""

    node: fx.Node
    start: fx.Node  # its result has the operation's dimensions; only moves come after it
    moves: tuple[fx.Node, ...]

    def channels(self, dims: tuple[int, ...]) -> Tensor | None:
        """Finds each element's channel, int64, in the result's shape; None: they lie along dims."""
        if not self.moves:
            return None
        shape = _tensor(self.start).shape
        sizes = [n if d in dims else 1 for d, n in enumerate(shape)]
        order = [shape[d] for d in dims]
        index = torch.arange(torch.Size(order).numel()).reshape(order)
        index = index.permute([dims.index(d) for d in sorted(dims)]).reshape(sizes).expand(shape)
        for move in self.moves:
            index = move.target(index, *move.args[1:], **move.kwargs)  # type: ignore[operator]
        return index


def activation_after(program: ExportedProgram, node: fx.Node) -> Activation | None:
    """Finds the activation function that is the only use of a node; see the module for the path."""
    static = {*program.graph_signature.inputs_to_parameters}
    static |= {*program.graph_signature.inputs_to_buffers}
    start = node
    moves: list[fx.Node] = []
    while True:
        users = [user for user in node.users if _has_tensor(user)]
        if len(users) != 1 or not users[0].args or users[0].args[0] is not node:
            return None
        user = users[0]
        name = operation_name(user)
        others = [x for x in user.all_input_nodes if x is not node]
        if name in ACTIVATIONS:
            return Activation(user, start, tuple(moves))
        if name in _MOVES and not others:
            moves.append(user)
        elif name in _POOLS and not moves:
            start = user
        elif name in _SAME or (name == "getitem" and user.args[1] == 0):
            start = start if moves else user
        elif name in _SCALED and all(x.name in static for x in others):
            start = start if moves else user
        else:
            return None
        node = user


def _tensor(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, tuple, list))
