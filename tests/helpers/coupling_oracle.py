# SPDX-License-Identifier: MIT
"""What must hold when a unit leaves a network, found by running it; it never imports lap_ext.

A unit is a list of members, each a parameter with the rows or columns of it that go. `Thinned` runs
a copy of the model in float64 whose tied parameters are untied, so that each use of a weight can be
changed alone.

    zeros       all members are zero: the output is y0, that of the network without the unit
    producers   any values in the rows, biases and norms that make it: still y0, as nobody reads it
    consumers   any values in the columns that read it: still y0, as it is zero

The same by gradients, which finds what is missing and what is too much. A weight is idle if the
output does not depend on it at all (its gradient is exactly zero):

    with the producers at zero, the weights that become idle are the consumers
    with the consumers at zero, the weights that become idle are the producers

`channel_sets` knows nothing of members: it cuts a network at its weighted calls and joins each
channel that a call reads with the channels that it changes with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

TOLERANCE = 1e-9
Masks = dict[str, Tensor]  # name -> True where the unit has weights


class Part(NamedTuple):
    """A parameter and the rows and columns of a unit; None: all. A vector has rows alone."""

    parameter: str
    rows: Sequence[int] | Tensor | None = None
    cols: Sequence[int] | Tensor | None = None


def bent(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """A function that is nowhere flat, linear on no interval, and 0 at 0."""
    return x + 0.5 * torch.sin(x)


# Piecewise functions that are flat somewhere: what they hide is no property of the network.
SMOOTH: dict[Any, Any] = dict.fromkeys(
    (F.relu, F.relu6, F.hardtanh, F.leaky_relu, torch.relu, Tensor.relu), bent
)
SMOOTH[F.hardswish] = lambda x, *_, **__: F.silu(x)
SMOOTH[F.hardsigmoid] = lambda x, *_, **__: torch.sigmoid(x)


class Smooth(TorchFunctionMode):
    """Runs functions without flat pieces in place of those that have some."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return SMOOTH.get(func, func)(*args, **(kwargs or {}))


def doubled(tree: Any) -> Any:
    """The same with float64 in place of other floats."""
    return pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x.clone(), tree
    )


def flattened(tree: Any) -> Tensor:
    """All numbers of a result, one after the other."""
    floats = (x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))
    return torch.cat([x.double().flatten() for x in floats if x.is_floating_point()])


def untied(model: nn.Module) -> tuple[nn.Module, dict[str, list[str]]]:
    """A float64 copy with a parameter of its own at each use, and the new names of each old one.

    A module that has several names keeps its parameter: it is one use.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    result = copy.deepcopy(model).double()
    names: dict[str, list[str]] = {}
    for (path, old), (_, new) in zip(model.named_modules(), result.named_modules(), strict=True):
        for name, parameter in old._parameters.items():
            if parameter is None:
                continue
            own = nn.Parameter(parameter.detach().double().clone())
            setattr(new, name, own)
            names.setdefault(first[id(parameter)], []).append(f"{path}.{name}" if path else name)
    return result.eval(), names


def _flips(module: nn.Module) -> bool:
    """Whether rows of its weight are inputs."""
    turned = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd)
    return isinstance(module, turned) or type(module).__name__ == "Conv1D"  # GPT-2's


class Thinned:
    """A network from which one unit at a time is taken.

    Args:
        model, args, kwargs: what is run.
        vectors: parameters whose entries belong to one channel each, though they have dimensions.
        flipped: parameters [inputs, outputs] that do not belong to a module that says so.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        vectors: Iterable[str] = (),
        flipped: Iterable[str] = (),
    ) -> None:
        self.model, self.names = untied(model)
        self.args, self.kwargs = doubled(tuple(args)), doubled(dict(kwargs or {}))
        self.vectors, self.flipped = set(vectors), set(flipped)
        self.parameters = dict(self.model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.random = torch.Generator().manual_seed(0)
        self.dense = self.run({})
        self._gradients = self.gradients({})
        top = max(float(g.abs().max()) for g in self._gradients.values() if g.numel())
        self._live = {name: g.abs() > 1e-10 * top for name, g in self._gradients.items()}
        self._nothing = 1e-14 * top

    # ---- members ---------------------------------------------------------------------------------
    def mask(self, name: str, part: Any) -> Tensor:
        """The weights of one member, in a bool tensor of the parameter's shape."""
        result = torch.zeros(self.values[name].shape, dtype=torch.bool)
        if part.parameter in self.vectors or result.dim() < 2:
            result.view(-1)[torch.as_tensor(part.rows)] = True
            return result
        matrix = result if self._windowed(name) else result.view(-1, result.shape[-1])
        rows, cols = (
            torch.arange(n) if given is None else torch.as_tensor(given)
            for given, n in zip((part.rows, part.cols), matrix.shape[:2], strict=True)
        )
        matrix[rows[:, None], cols] = True
        return result

    def sides(self, members: Iterable[Any]) -> tuple[Masks, Masks]:
        """What makes the unit, and what reads it."""
        made, read = Masks(), Masks()
        for part in members:
            for name in self.names.get(part.parameter, ()):  # not of a buffer
                mask = self.mask(name, part)
                vector = part.parameter in self.vectors or mask.dim() < 2
                flips = part.parameter in self.flipped or _flips(self._owner(name))
                reads = not vector and (part.cols is None) == flips
                side = read if reads else made
                side[name] = side.get(name, torch.zeros_like(mask)) | mask
        return made, read

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _windowed(self, name: str) -> bool:
        return isinstance(self._owner(name), nn.modules.conv._ConvNd)

    # ---- runs ------------------------------------------------------------------------------------
    @contextmanager
    def changing(self, changes: Masks) -> Iterator[None]:
        """Other values for some of the parameters."""
        for name, value in changes.items():
            self.parameters[name].data.copy_(value)
        yield
        for name in changes:
            self.parameters[name].data.copy_(self.values[name])

    def run(self, changes: Masks) -> Tensor:
        """The output with other values for some of the parameters."""
        with self.changing(changes), torch.no_grad(), Smooth():
            return flattened(self.model(*doubled(self.args), **doubled(self.kwargs)))

    def changed(self, zero: Iterable[Masks], filled: Iterable[Masks] = ()) -> Masks:
        """The parameters with zeros in some masks, and then with random values in others."""
        result = Masks()
        for masks in zero:
            for name, mask in masks.items():
                result[name] = result.get(name, self.values[name]).masked_fill(mask, 0.0)
        for masks in filled:
            for name, mask in masks.items():
                noise = torch.randn(mask.shape, generator=self.random, dtype=torch.float64)
                result[name] = torch.where(mask, noise, result.get(name, self.values[name]))
        return result

    def gradients(self, changes: Masks) -> Masks:
        """How some mixture of the outputs depends on each weight."""
        with self.changing(changes):
            with Smooth():
                y = flattened(self.model(*doubled(self.args), **doubled(self.kwargs)))
            mixture = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
            weights = list(self.parameters.values())
            found = torch.autograd.grad(y @ mixture, weights, allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self.parameters.items(), found, strict=True)
        }

    # ---- what must hold --------------------------------------------------------------------------
    def faults(self, *units: Sequence[Any]) -> list[str]:
        """What of the three runs does not hold when these units go, a text each.

        A unit that nothing reads is a pair, q and k of an attention: each of its rows may then have
        any values alone.
        """
        sides = [self.sides(members) for members in units]
        every = [masks for pair in sides for masks in pair]
        zero = self.run(self.changed(every))
        result = []
        if not bool((zero - self.dense).abs().max() > 1e-10 * self.dense.abs().max()):
            result.append("nothing changes without it, so that the runs say nothing")
        runs = [("producers", [made for made, read in sides if read])]
        runs += [("consumers", [read for _, read in sides])]
        if len(units) == 1 and not sides[0][1]:
            runs = self._alone(units[0])
        for side, filled in runs:
            other = self.run(self.changed(every, filled))
            error = float((other - zero).abs().max() / (1 + zero.abs().max()))
            if not error <= TOLERANCE:
                result.append(f"{side}: the output changes by {error:.1e}")
        return result

    def _alone(self, members: Sequence[Any]) -> list[tuple[str, list[Masks]]]:
        """Each row of each weight by itself."""
        runs = []
        for part in members:
            of_columns = part.rows is None
            for index in part.cols if of_columns else part.rows:
                own = Part(part.parameter, *([None, [index]] if of_columns else [[index], None]))
                runs.append((f"{part.parameter}[{index}]", [self.sides([own])[0]]))
        return runs

    def idle(self, changes: Masks) -> Masks:
        """The weights on which the output no longer depends, though it does in the full network."""
        found = self.gradients(changes)
        return {n: (g.abs() <= self._nothing) & self._live[n] for n, g in found.items()}

    def differences(self, members: Sequence[Any]) -> list[str]:
        """Where idle weights are not the members: what is missing and what is too much."""
        made, read = self.sides(members)
        result = []
        for side, zero, expected in (("consumers", made, read), ("producers", read, made)):
            if not read and side == "producers":
                continue
            for name, found in self.idle(self.changed([zero])).items():
                nothing = torch.zeros_like(found)
                counted = self._live[name] & ~zero.get(name, nothing)
                wanted = expected.get(name, nothing) & counted
                idle = found & counted
                for text, wrong in (("missing", idle & ~wanted), ("too much", wanted & ~idle)):
                    if bool(wrong.any()):
                        at = wrong.nonzero()[0].tolist()
                        result.append(f"{side}, {name}: {int(wrong.sum())} {text}, first {at}")
        return result


# ---- sets of channels, without members -----------------------------------------------------------
class Use(NamedTuple):
    """A call of a weight."""

    name: str
    x: Tensor | None  # None: no float
    dim: int  # of x: its channels
    y: Tensor  # the leaf in place of its result
    out: int  # of y: its channels
    groups: int
    flipped: bool


_SPATIAL = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_SPATIAL |= {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


class Cut(Smooth):
    """Answers each call of a weight with a fresh leaf of the same values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SPATIAL and func not in (F.linear, F.embedding):
            return super().__torch_function__(func, types, args, kwargs)
        x, weight = args[:2]
        y = func(*args, **(kwargs or {})).detach().requires_grad_()
        spatial = _SPATIAL.get(func, 0)
        turned = "transpose" in func.__name__
        groups = args[6] if spatial and len(args) > 6 else (kwargs or {}).get("groups", 1)
        kept = x.clone() if x.requires_grad else None
        flipped = turned or func is F.embedding
        into, out = x.dim() - 1 - spatial, y.dim() - 1 - spatial
        self.uses.append(Use(self.names[id(weight)], kept, into, y, out, groups, flipped))
        return y.clone()


def channel_sets(
    model: nn.Module, args: Sequence[Any]
) -> tuple[set[frozenset[tuple[str, str, int]]], set[frozenset[tuple[str, str, int]]]]:
    """The channels that go together, and those that cannot go, as sets of (name, side, channel).

    The side is "out" or "in". A network of linear layers, convolutions and embeddings, each a
    module's. What its result or its input depends on cannot go. A convolution with one input a
    group loses its outputs with it; other groups are not looked at.
    """
    model = copy.deepcopy(model).double().eval()
    inputs = pytree.tree_map_only(
        Tensor, lambda x: x.double().requires_grad_() if x.is_floating_point() else x, tuple(args)
    )
    cut = Cut(model)
    with cut:
        result = model(*inputs)
    leaves = {("", i): x for i, x in enumerate(inputs) if x.requires_grad}
    leaves |= {(use.name, i): use.y for i, use in enumerate(cut.uses)}
    sets = _Sets()
    ends = [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]
    for y in ends:
        _join(sets, [("", "out", 0)], y.reshape(1, -1), leaves, cut.uses)
    for use in cut.uses:
        sizes = use.y.shape[use.out]
        for channel in range(sizes):
            sets.find((use.name, "out", channel))
        if use.x is None:
            continue
        width = use.x.shape[use.dim]
        nodes = [(use.name, "in", channel) for channel in range(width)]
        _join(sets, nodes, use.x.movedim(use.dim, 0).flatten(1), leaves, cut.uses)
        if use.groups > 1 and use.groups == width:
            for channel in range(sizes):
                sets.join((use.name, "in", channel * width // sizes), (use.name, "out", channel))
    return sets.parted()


def _join(sets: _Sets, nodes: list[Any], x: Tensor, leaves: Any, uses: list[Use]) -> None:
    """Joins row i of x, a node, with each channel of a leaf that it depends on."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for node, row, mixture in zip(nodes, x, noise, strict=True):
        found = torch.autograd.grad(
            row @ mixture, list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for (name, index), gradient in zip(leaves, found, strict=True):
            if gradient is None:
                continue
            if not name:
                sets.join(node, ("", "out", 0))
                continue
            by_channel = gradient.movedim(uses[index].out, 0).flatten(1).abs().sum(1)
            for channel in by_channel.nonzero().flatten().tolist():
                sets.join(node, (name, "out", channel))


class _Sets:
    """Sets that grow together. The node ("", "out", 0) is what is outside the network."""

    def __init__(self) -> None:
        self.above: dict[Any, Any] = {}

    def find(self, node: Any) -> Any:
        self.above.setdefault(node, node)
        while self.above[node] != node:
            node = self.above[node]
        return node

    def join(self, a: Any, b: Any) -> None:
        self.above[self.find(a)] = self.find(b)

    def parted(self) -> tuple[Any, Any]:
        """The sets that may go, and those that may not."""
        outside = self.find(("", "out", 0))
        found: dict[Any, set[Any]] = {}
        for node in list(self.above):
            found.setdefault(self.find(node), set()).add(node)
        fixed = found.pop(outside) - {("", "out", 0)}
        return {frozenset(x) for x in found.values()}, {frozenset(fixed)}
