# SPDX-License-Identifier: MIT
"""Runs a traced model on real batches and shows what enters and leaves its operations.

The graph that is run is that of the trace, exported once more for each shape of a batch, with the
model's own parameters and copies of its buffers. So what a role is said to read is what it reads,
whatever the modules are called and in which order they were made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lap_ext.criteria.statistics.isolation import same_random_state
from lap_ext.topology import Topology, TopologyError
from lap_ext.topology.call import module_path, operation_name
from lap_ext.topology.export import INLINED, export, named_tensors, placeholders


@dataclass(frozen=True)
class Watches:
    """What is called when nodes run: before, with their arguments, or after, with their result."""

    before: Mapping[fx.Node, Callable[[tuple[Any, ...], dict[str, Any]], None]] = field(
        default_factory=dict
    )
    after: Mapping[fx.Node, Callable[[Any], None]] = field(default_factory=dict)


# A program and the node of every role in it -> what to watch there.
Watcher: TypeAlias = Callable[[ExportedProgram, list[fx.Node]], Watches]


def replay(
    topology: Topology, data: Any, watcher: Watcher, *, function: str, criterion: str
) -> None:
    """Runs every batch of data in evaluation mode, without gradients; nothing is changed.

    Args:
        topology: of the model.
        data: batches: each a tensor, a tuple of positional arguments (a target behind them, more
            than forward takes, is left out), or a mapping of named ones.
        watcher: asked once for each program, that is for each shape of a batch.
        function: whose name errors carry.
        criterion: whose name errors carry.
    """
    programs: dict[str, tuple[ExportedProgram, Watches]] = {}
    tensors = {name: x.detach() for name, x in named_tensors(topology.model).items()}
    for name, buffer in topology.model.named_buffers(remove_duplicate=False):
        tensors[name] = buffer.detach().clone()
    with same_random_state(topology.model), torch.no_grad():
        for batch in batches(data, function, criterion):
            args, kwargs = call_of(topology.model, batch, function)
            leaves, key = _signature(args, kwargs)
            if key not in programs:
                program = program_of(topology, args, kwargs, function)
                nodes = role_nodes(topology, program, function)
                programs[key] = program, watcher(program, nodes)
            program, watches = programs[key]
            _Player(program.graph_module, watches).run(*_inputs(program, tensors, leaves))


def program_of(
    topology: Topology, args: tuple[Any, ...], kwargs: dict[str, Any], function: str
) -> ExportedProgram:
    """The graph of the model for the arguments in a batch of data."""
    try:
        return export(topology.model, args, kwargs)
    except TopologyError as error:
        text = str(error.__cause__).strip().split("\n")[0][:300]
        raise ValueError(
            f"{function}: expected batches of data that the model accepts as it does its "
            f"example_inputs, got {type(error.__cause__).__name__}: {text}"
        ) from error


def batches(data: Any, function: str, criterion: str) -> Iterator[Any]:
    """The batches of data, at least one."""
    if data is None:
        raise ValueError(
            f"{function}: expected data for criterion {criterion!r} (batches to run the model on), "
            "got None. Pass data=loader or a list of batches."
        )
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise TypeError(
            f"{function}: expected data to be an iterable of batches, got {type(data).__name__}. "
            "Pass [batch] for one batch."
        )
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise ValueError(f"{function}: expected data with one batch or more, got none.")


def call_of(model: nn.Module, batch: Any, function: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of forward in a batch: (positional, named).

    Example:
        >>> call_of(nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1)), "prune")
        ((tensor([[1., 1.]]),), {})
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"{function}: expected a batch to be a tensor, a tuple of positional arguments or a "
            f"dict of named ones, got {type(batch).__name__}."
        )
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = sum(kind in positional for kind in kinds)
    target = inspect.Parameter.VAR_POSITIONAL not in kinds and len(batch) == places + 1
    return tuple(batch[:-1] if target else batch), {}


def role_nodes(topology: Topology, program: ExportedProgram, function: str) -> list[fx.Node]:
    """The node of every role in another program of the same model, in the order of the roles."""
    nodes = list(_walk(program.graph_module))
    found: list[fx.Node] = []
    start = 0
    for role in topology.roles:
        if found and role.node is topology.roles[len(found) - 1].node:  # a fused layer
            found.append(found[-1])
            continue
        wanted = _place_of(role.node)
        place = next((n for n in range(start, len(nodes)) if _place_of(nodes[n]) == wanted), None)
        if place is None:
            raise ValueError(
                f"{function}: expected batches that take the same way through the model as the "
                f"example_inputs, got one without the operation {role.node.name} of layer "
                f"{role.layer!r}. Trace the model with inputs like those of data."
            )
        found.append(nodes[place])
        start = place + 1
    return found


def _place_of(node: fx.Node) -> tuple[str, str, str]:
    """(name, operation, path of the module)."""
    return node.name, str(node.target), module_path(node)


def _walk(module: fx.GraphModule) -> Iterator[fx.Node]:
    """All calls in the order in which they run, those of sub-graphs in place."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if operation_name(node) in INLINED:
            body = next(x for x in node.args if isinstance(x, fx.Node) and x.op == "get_attr")
            yield from _walk(getattr(module, str(body.target)))
        else:
            yield node


def _signature(args: Any, kwargs: Any) -> tuple[list[Any], str]:
    """The leaves of a call, and what a program for it depends on."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kinds = [(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
    return leaves, f"{spec} {kinds}"


def _inputs(
    program: ExportedProgram, tensors: Mapping[str, Tensor], leaves: list[Any]
) -> list[Any]:
    """A value for each placeholder; tensors of the batch are copied: a graph may write to them."""
    given = iter([x.detach().clone() for x in leaves if isinstance(x, Tensor)])
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    found: list[Any] = []
    for (kind, name, constant), node in zip(placeholders(program), nodes, strict=True):
        if kind in ("parameter", "buffer"):
            found.append(tensors[name])
        elif kind == "constant":
            found.append(constant)
        else:
            fake = node.meta.get("val")
            found.append(next(given) if isinstance(fake, Tensor) else fake)
    assert next(given, None) is None
    return found


class _Player(fx.Interpreter):
    """Runs a program; sub-graphs are run as part of it."""

    def __init__(self, module: fx.GraphModule, watches: Watches) -> None:
        super().__init__(module)
        self.watches = watches

    def run_node(self, n: fx.Node) -> Any:
        """One operation."""
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
        place = next(n for n, x in enumerate(args) if isinstance(x, fx.GraphModule))
        mode: AbstractContextManager[Any] = nullcontext()
        if name == "wrap_with_autocast":
            mode = torch.autocast(args[0], args[1], args[2], args[3])
        rest = [x for x in args[place + 1 :] if not isinstance(x, str)]  # a sub-graph's name
        with mode:
            return _Player(args[place], self.watches).run(*rest)
