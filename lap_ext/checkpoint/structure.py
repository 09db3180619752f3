# SPDX-License-Identifier: MIT
"""The topology of a checkpoint, and where each layer is stored, before a layer's weights are read.

The model is traced as a twin: the same modules with fake tensors in place of the parameters
(torch.export computes nothing, so they need no memory). Only the weights of norms and other small
tensors that scale an edge are read at this point.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lap_ext.checkpoint import hf
from lap_ext.checkpoint.config import GIVE
from lap_ext.checkpoint.files import Checkpoint, Copy
from lap_ext.checkpoint.guard import counted_calls
from lap_ext.checkpoint.names import Names, untied
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.errors import LapTypeError, LapValueError, TopologyError, warn
from lap_ext.options import Inputs, OnUnsupported
from lap_ext.topology import Topology, trace


@dataclass(frozen=True)
class Structure:
    """A traced checkpoint."""

    topology: Topology
    copies: dict[str, list[Copy]]  # layer name -> where it is stored
    find: Callable[[str], list[Copy]]  # finds where a parameter is stored


def structure_of(
    checkpoint: Checkpoint,
    model: nn.Module | None,
    example_inputs: Inputs | None,
    on_unsupported: OnUnsupported,
) -> Structure:
    """Traces the model of a checkpoint, or the given one, and finds its tensors in the files."""
    own = hf.build(checkpoint) if model is None else model
    if not isinstance(own, nn.Module):
        raise LapTypeError(
            "{argument} to be a torch.nn.Module", type(own).__name__, argument="model"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = _fake_inputs(own, example_inputs, mode)  # for all branches first
    names = untied(checkpoint, own) if model is None else Names(checkpoint, own)
    with ExitStack() as stack:
        if model is None:
            stack.enter_context(hf.telling("a config.json whose model can be traced", GIVE))
            stack.enter_context(counted_calls(checkpoint))
        topology = _traced(twin(own, mode), inputs, on_unsupported)
    _check_stored(topology)
    copies = {name: names.copies(layer.parameter) for name, layer in topology.layers.items()}
    scales = {name: _value(own, names, name) for name in sorted(_scaling(topology))}
    names.warn_of_unknown()
    return Structure(topology.with_tensors(scales), copies, names.copies)


def _check_stored(topology: Topology) -> None:
    """Raises where the model computes a weight: what is stored is not what it uses."""
    for layer in topology.layers.values():
        if layer.computed:
            raise LapValueError(
                "weights that the model uses as they are stored",
                "one that it computes from what is stored",
                "Load the model into memory and call lap_ext.prune.",
                layer=layer.name,
            )


def _traced(model: nn.Module, inputs: list[Inputs], on_unsupported: OnUnsupported) -> Topology:
    """Traces a model with the first inputs that it can be traced with; warns if others failed."""
    first, *fewer = inputs
    try:
        return trace(model, first, on_unsupported=on_unsupported)
    except TopologyError as error:
        for given in fewer:
            with suppress(TopologyError):
                topology = trace(model, given, on_unsupported=on_unsupported)
                warn(
                    f"The image branch is not pruned: its trace expected {error.expected}, got "
                    f"{error.got}. To prune it, pass {{model=}} and {{example_inputs=}} that reach "
                    "it."
                )
                return topology
        raise


def twin(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copies a model with fake parameters on the CPU; tied ones stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        fake = nn.Parameter(_fake(parameter, mode), requires_grad=False)
        memo[id(parameter)] = fake
    for buffer in model.buffers():
        memo[id(buffer)] = _fake(buffer, mode) if buffer.is_meta else buffer.detach().cpu()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise LapValueError(
            "a model that copy.deepcopy can copy (it is traced without its weights)",
            f"{type(error).__name__}: {error}",
            "Build it anew on the meta device.",
        ) from error


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _fake_inputs(
    model: nn.Module, example_inputs: Inputs | None, mode: FakeTensorMode
) -> list[Inputs]:
    """Makes inputs for the trace with fake tensors on the CPU: the given ones, or candidates."""
    given: list[Any] = [example_inputs]
    if example_inputs is None:
        if not hasattr(model, "main_input_name"):
            raise LapValueError(
                "{argument} with model",
                "none",
                "Pass a tensor, a tuple, or a dict of named ones.",
                argument="example_inputs",
            )
        given = [
            {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in made.items()}
            for made in hf.inputs(model)
        ]
    return [pytree.tree_map_only(Tensor, lambda x: _fake(x, mode), x) for x in given]


def _scaling(topology: Topology) -> set[str]:
    """Lists the parameters and buffers that scales of edges are computed from."""
    edges = [edges for group in topology.graph.channels.groups for edges in group.edges]
    return {name for x in edges if x.scale is not None for name in x.scale.names}


def _value(model: nn.Module, names: Names, name: str) -> Tensor:
    """Reads a parameter or buffer from the files, or takes a buffer that the model makes itself."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if name not in buffers or names.has(name):
        shape = names.shape(name)
        return Source(names.checkpoint).full(names.copies(name)[0], Buffer()).reshape(shape)
    if buffers[name].is_meta and hasattr(model, "_init_weights"):
        hf.initialize(model, [name])
        return model.get_buffer(name)
    if buffers[name].is_meta:
        raise LapValueError(
            f"a value for the buffer {name!r}, which scales channels and is in no file",
            "a buffer on the meta device, without a value",
            "Build the model on the CPU, so that its buffers have values.",
        )
    return buffers[name].detach().cpu()
