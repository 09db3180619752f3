# SPDX-License-Identifier: MIT
"""Runs a traced model on batches of data and watches the inputs and outputs of its operations.

Runs the traced graph, exported once more for each shape of a batch, with the model's own parameters
and copies of its buffers. So the inputs that are seen are those of the role itself, however the
modules are named and in whatever order they were created.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lap_ext.criteria.statistics.isolation import same_random_state
from lap_ext.errors import LapTypeError, LapValueError, callback
from lap_ext.topology import Topology, TopologyError
from lap_ext.topology.call import node_key, operation_name
from lap_ext.topology.export import INLINED, export, named_tensors, placeholders


@dataclass(frozen=True)
class Watches:
    """Functions to call when nodes run: before, with the arguments, or after, with the result."""

    before: Mapping[fx.Node, Callable[[tuple[Any, ...], dict[str, Any]], None]] = field(
        default_factory=dict
    )
    after: Mapping[fx.Node, Callable[[Any], None]] = field(default_factory=dict)


# (a program, the node of every role in it) -> what to watch there
Watcher: TypeAlias = Callable[[ExportedProgram, list[fx.Node]], Watches]


def replay(topology: Topology, data: Any, watcher: Watcher) -> None:
    """Runs every batch of data in evaluation mode, without gradients; the model is not changed.

    Args:
        topology: of the model.
        data: batches: each a tensor, a tuple of positional arguments (a target after them, one
            more than forward takes, is left out), or a mapping of named ones.
        watcher: called once for each program, that is for each shape of a batch.
    """
    programs: dict[str, tuple[ExportedProgram, Watches]] = {}
    tensors = {name: x.detach() for name, x in named_tensors(topology.model).items()}
    for name, buffer in topology.model.named_buffers(remove_duplicate=False):
        tensors[name] = buffer.detach().clone()
    with same_random_state(topology.model), torch.no_grad():
        for batch in batches(data):
            args, kwargs = call_of(topology.model, batch)
            leaves, key = _signature(args, kwargs)
            if key not in programs:
                program = program_of(topology, args, kwargs)
                nodes = role_nodes(topology, program)
                programs[key] = program, watcher(program, nodes)
            program, watches = programs[key]
            _Interpreter(program.graph_module, watches).run(*_inputs(program, tensors, leaves))


def program_of(
    topology: Topology, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ExportedProgram:
    """Exports the graph of the model for the arguments in a batch of data."""
    try:
        return export(topology.model, args, kwargs)
    except TopologyError as error:
        raise LapValueError(
            "batches of data that the model accepts as it does its example_inputs", error.got
        ) from error


_END = object()  # of the batches


def batches(data: Any) -> Iterator[Any]:
    """Yields the batches of data, at least one."""
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise LapTypeError(
            "data to be an iterable of batches", type(data).__name__, "Pass [batch] for one batch."
        )
    empty = True
    with callback():
        iterator = iter(data)
    while True:
        with callback():
            batch = next(iterator, _END)
        if batch is _END:
            break
        empty = False
        yield batch
    if empty:
        raise LapValueError("data with one batch or more", "none")


def elements(model: nn.Module, data: Any) -> Iterator[Any]:
    """Yields the elements of all batches, each as a batch of one.

    They are the entries along dimension 0 of the tensors in a batch, if all have as many (tensors
    of one entry, or of no dimension, belong to each). Any other batch is one element.

    Example:
        >>> first, second = elements(nn.Linear(2, 2), [torch.tensor([[1., 2.], [3., 4.]])])
        >>> second
        (tensor([[3., 4.]]),)
    """
    for batch in batches(data):
        args, kwargs = call_of(model, batch)
        given = kwargs or args
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        sizes = {x.shape[0] for x in tensors if x.dim()} - {1}
        size = sizes.pop() if len(sizes) == 1 else 1
        for index in range(size):
            yield pytree.tree_map_only(Tensor, partial(_entry, index, size), given)


def _entry(index: int, size: int, x: Tensor) -> Tensor:
    """Cuts one entry from a tensor that has so many."""
    return x[index : index + 1] if x.dim() and x.shape[0] == size else x


def call_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of forward in a batch: (positional, named).

    Example:
        >>> call_of(nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1)))
        ((tensor([[1., 1.]]),), {})
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, (tuple, list)):
        raise LapTypeError(
            "a batch to be a tensor, a tuple of positional arguments or a dict of named ones",
            type(batch).__name__,
        )
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = sum(kind in positional for kind in kinds)
    target = inspect.Parameter.VAR_POSITIONAL not in kinds and len(batch) == count + 1
    return tuple(batch[:-1] if target else batch), {}


def role_nodes(topology: Topology, program: ExportedProgram) -> list[fx.Node]:
    """Finds the node of every role in another program of the model, in the order of the roles."""
    nodes = list(_walk(program.graph_module))
    result: list[fx.Node] = []
    start = 0
    for role in topology.roles:
        if result and role.node is topology.roles[len(result) - 1].node:  # a fused layer
            result.append(result[-1])
            continue
        key = role.node
        index = next((n for n in range(start, len(nodes)) if node_key(nodes[n]) == key), None)
        if index is None:
            raise LapValueError(
                "batches that follow the same path through the model as the example_inputs",
                f"one that does not run the operation {role.node.name} of layer {role.layer!r}",
                "Trace the model with inputs like those of data.",
            )
        result.append(nodes[index])
        start = index + 1
    return result


def _walk(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Yields all calls in the order in which they run, including those of sub-graphs."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if operation_name(node) in INLINED:
            body = next(x for x in node.args if isinstance(x, fx.Node) and x.op == "get_attr")
            yield from _walk(getattr(module, str(body.target)))
        else:
            yield node


def _signature(args: Any, kwargs: Any) -> tuple[list[Any], str]:
    """Returns the leaves of a call, and a key of what a program for it depends on."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kinds = [(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
    return leaves, f"{spec} {kinds}"


def _inputs(
    program: ExportedProgram, tensors: Mapping[str, Tensor], leaves: list[Any]
) -> list[Any]:
    """Lists the value of each placeholder, with copies of the batch, which a graph may write to."""
    given = iter([x.detach().clone() for x in leaves if isinstance(x, Tensor)])
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    values: list[Any] = []
    for (kind, name, constant), node in zip(placeholders(program), nodes, strict=True):
        if kind in ("parameter", "buffer"):
            values.append(tensors[name])
        elif kind == "constant":
            values.append(constant)
        else:
            fake = node.meta.get("val")
            values.append(next(given) if isinstance(fake, Tensor) else fake)
    assert next(given, None) is None
    return values


class _Interpreter(fx.Interpreter):
    """Runs a program, its sub-graphs included, and calls the watches."""

    def __init__(self, module: fx.GraphModule, watches: Watches) -> None:
        super().__init__(module)
        self.watches = watches

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation, with its watches."""
        if n.op == "call_function" and operation_name(n) in INLINED:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return self._inlined(operation_name(n), args)
        if n in self.watches.before:
            self.watches.before[n](*self.fetch_args_kwargs_from_env(n))
        result = super().run_node(n)
        if n in self.watches.after:
            self.watches.after[n](result)
        return result

    def _inlined(self, name: str, args: tuple[Any, ...]) -> Any:
        index = next(n for n, x in enumerate(args) if isinstance(x, fx.GraphModule))
        mode: AbstractContextManager[Any] = nullcontext()
        if name == "wrap_with_autocast":
            mode = torch.autocast(args[0], args[1], args[2], args[3])
        rest = [x for x in args[index + 1 :] if not isinstance(x, str)]  # a sub-graph's name
        with mode:
            return _Interpreter(args[index], self.watches).run(*rest)
