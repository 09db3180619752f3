# SPDX-License-Identifier: MIT
"""What is known of a checkpoint before a weight is read: its topology, and where each layer is stored.

The model is traced as a twin: the same modules with fake tensors in place of the parameters
(torch.export computes nothing, so they need no memory). Weights of norms and other small tensors
that scale an edge are the only ones that are read now.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lap_ext.checkpoint import hf
from lap_ext.checkpoint.files import Copy, Folder, wrong
from lap_ext.checkpoint.names import Names
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.topology import Topology, trace


@dataclass(frozen=True)
class Structure:
    """A traced checkpoint."""

    topology: Topology
    copies: dict[str, list[Copy]]  # layer name -> where it is stored
    scales: dict[str, Tensor]  # the tensors that factors on edges are computed from


class FileTopology(Topology):
    """A topology whose scales, and those of its layers' edges, are computed from tensors of files."""

    def __init__(self, topology: Topology, tensors: Mapping[str, Tensor]) -> None:
        self.__dict__.update(topology.__dict__)
        self._read = dict(tensors)
        self.layers = {name: replace(x, topology=self) for name, x in topology.layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What has been read."""
        return self._read


def structure_of(
    folder: Folder, model: nn.Module | None, example_inputs: Any, unknown: str
) -> Structure:
    """Traces the model of a folder, or the one that is given, and finds its tensors in the files."""
    own = hf.build(folder.path) if model is None else model
    if not isinstance(own, nn.Module):
        raise TypeError(
            f"checkpoint.prune: expected model to be a torch.nn.Module, got {type(own).__name__}."
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = _example(own, example_inputs, mode)
    names = Names(folder, own)
    if model is None:
        hf.untie(own, names.unlike(Source(folder.path)))
        names = Names(folder, own)
    topology = trace(twin(own, mode), args, kwargs, unknown=unknown)
    copies = {name: names.copies(layer.parameter) for name, layer in topology.layers.items()}
    scales = {name: _value(own, names, name) for name in sorted(_scaling(topology))}
    return Structure(FileTopology(topology, scales), copies, scales)


def twin(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model with fake parameters on the CPU; tied ones stay tied, the model as it is."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        fake = nn.Parameter(_fake(parameter, mode), requires_grad=False)
        memo[id(parameter)] = fake
    for buffer in model.buffers():
        memo[id(buffer)] = _fake(buffer, mode) if buffer.is_meta else buffer.detach().cpu()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise wrong(
            "a model that copy.deepcopy can copy (it is traced without its weights)",
            f"{type(error).__name__}: {error}",
            "Build it anew on the meta device.",
        ) from error


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _example(
    model: nn.Module, example_inputs: Any, mode: FakeTensorMode
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named inputs for the trace, as fake tensors on the CPU."""
    given = example_inputs
    if given is None:
        if not hasattr(model, "main_input_name"):
            raise wrong(
                "example_inputs with model", "none", "A tensor, a tuple or a dict of names."
            )
        made = hf.inputs(model)
        given = {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in made.items()}
    given = pytree.tree_map_only(Tensor, lambda x: _fake(x, mode), given)
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}


def _scaling(topology: Topology) -> set[str]:
    """Names of the parameters and buffers that factors on edges are computed from."""
    arcs = [arcs for space in topology.graph.channels.spaces for arcs in space.arcs]
    return {name for x in arcs if x.scale is not None for name in x.scale.names}


def _value(model: nn.Module, names: Names, name: str) -> Tensor:
    """A parameter or buffer: of the files, or a buffer that the model makes itself."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if name not in buffers or names.has(name):
        shape = names.shape(name)
        return Source(names.folder.path).whole(names.copies(name)[0], Buffer()).reshape(shape)
    if buffers[name].is_meta and hasattr(model, "_init_weights"):
        hf.settle(model, [name])
        return model.get_buffer(name)
    if buffers[name].is_meta:
        raise wrong(
            f"a value for the buffer {name!r}, which scales channels and is in no file",
            "one on the meta device",
            "Build the model on the CPU.",
        )
    return buffers[name].detach().cpu()
