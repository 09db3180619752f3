# SPDX-License-Identifier: MIT
"""A model as a graph of ATen operations, by torch.export on fake tensors: nothing is computed.

The model is exported as it is in evaluation mode (dropout off, batch norm with its running
statistics) and is left as it was.
"""

from __future__ import annotations

import inspect
import operator
import threading
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from lap_ext.computed import Reference, as_parameters, evaluating, references, value
from lap_ext.errors import LapError, LapTypeError, TopologyError
from lap_ext.ops.memory import memory_key
from lap_ext.topology.exportable import exportable
from lap_ext.topology.failures import check_inputs, failure, quiet_logs

# torch.export changes the state of the process: one thread at a time.
_EXPORTING = threading.RLock()
# Calls of a subgraph that are followed as if its operations stood in place of the call.
INLINED = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "invoke_subgraph"}
_WRITES = {"copy_", "index_put_", "fill_", "zero_", "masked_fill_", "index_add_", "scatter_"}
_MOVES = {"view", "select", "slice", "transpose", "permute", "unsqueeze", "squeeze", "expand",
          "narrow", "split", "chunk", "unbind", "t", "detach", "alias", "reshape", "flatten",
          "unflatten", "view_as", "diagonal", "swapaxes", "movedim"}  # fmt: skip


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """Exports the graph of model(*args, **kwargs) in evaluation mode.

    A cache of keys and values (transformers' language models) is not an output that layers feed:
    it is switched off, in use_cache and in configs, and left out of the outputs.
    """
    if not isinstance(model, nn.Module):
        raise LapTypeError("model to be a torch.nn.Module", type(model).__name__)
    _check_names(model)
    named = dict(kwargs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        named.setdefault("use_cache", False)
    check_inputs(model, args, named)
    quiet = _quiet(), quiet_logs()
    with _EXPORTING, evaluating(model), as_parameters(model), quiet[0], quiet[1], exportable(model):
        try:
            program = torch.export.export(model, args, named, strict=False)
            if _writes_into_views(program):
                program = program.run_decompositions({})
        except LapError:
            raise
        except Exception as error:
            raise failure(model, error) from error
    return program


def _check_names(model: nn.Module) -> None:
    """Refuses names that torch.export, which quotes them in Python code, would run as code."""
    modules = (name for name, _ in model.named_modules(remove_duplicate=False))
    for name in (*modules, *named_tensors(model)):
        if not name.isprintable() or any(mark in name for mark in "\"'\\"):
            raise TopologyError(
                "names of modules and tensors without quotes, backslashes and control characters "
                "(torch.export writes them into Python code)",
                repr(name),
                "Rename that module.",
            )


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits inputs into (positional, named) arguments of a forward; a tensor alone is one.

    Example:
        >>> arguments((1, 2)), arguments({"x": 1}), arguments(3)
        (((1, 2), {}), ((), {'x': 1}), ((3,), {}))
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (() if example_inputs is None else (example_inputs,)), {}


def on_device_of(
    model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves inputs to the device of a model that has only one, the meta device included."""
    devices = {x.device for x in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return inputs
    (device,) = devices
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda x: x.to(device), inputs
    )
    return moved


class _NamedTensors(Mapping[str, Tensor]):
    """The tensors of a model by name; those that it computes are computed when they are read."""

    def __init__(self, stored: dict[str, Tensor], computed: dict[str, Reference]) -> None:
        self._known = stored
        self._names = dict.fromkeys([*stored, *computed])
        self._computed = computed

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = value(*self._computed[name])
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def named_tensors(model: nn.Module) -> Mapping[str, Tensor]:
    """Returns parameters, buffers and the tensors that modules compute, under all their names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return _NamedTensors(tensors, references(model))


def first_names(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter or computed tensor to the first name of the same memory."""
    first: dict[Hashable, str] = {}
    names = {
        name: first.setdefault(memory_key(p), name)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    made = {
        name: first.setdefault((id(module), attribute), name)
        for name, (module, attribute) in references(model).items()
    }
    return names | made


def placeholders(program: ExportedProgram) -> list[tuple[str, str, Any]]:
    """Lists (kind, name, constant) of each input of the graph, in order.

    kind: "parameter", "buffer", "constant" or "input".
    """
    inputs: list[tuple[str, str, Any]] = []
    for spec in program.graph_signature.input_specs:
        target = spec.target or ""
        if spec.kind is InputKind.PARAMETER:
            inputs.append(("parameter", target, None))
        elif spec.kind is InputKind.BUFFER:
            inputs.append(("buffer", target, None))
        elif spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ):
            inputs.append(("constant", target, program.constants.get(target)))
        else:
            inputs.append(("input", getattr(spec.arg, "name", target), None))
    return inputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Switches off the fused attention module, gradients and warnings."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings(), torch.no_grad():  # outputs of chunk may be written
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _writes_into_views(program: ExportedProgram) -> bool:
    """Whether a view of a tensor, or a tensor that has views, is written in place.

    The graph must then be made functional.
    """
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        name = schema.name.rpartition("::")[2]
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        seen = any(_is_view(user) and user < node for user in source.users)
        if name in _WRITES or _is_view(source) or seen:
            return True
    return False


def _is_view(node: fx.Node) -> bool:
    """Whether a result may share the memory of an argument."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _is_view(node.args[0])
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.rpartition("::")[2] in _MOVES
