# SPDX-License-Identifier: MIT
"""Values that depend on parameters, buffers and constants alone, kept as expressions.

A scale on an edge (the weight of a norm, a layer scale, 1 + w, exp(w)) is such an expression. It is
computed whenever scores are, from the model's weights at that moment.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lap_ext.errors import LapValueError
from lap_ext.ops.reference.common import exact_sqrt, require_batch_norm


@dataclass(frozen=True)
class _Named:
    """An operation of torch by its name: "aten.mul.Tensor"."""

    name: str

    def operation(self) -> Any:
        return operator.attrgetter(self.name)(torch.ops)


@dataclass(frozen=True, eq=False)
class Static:
    """A parameter or buffer (name), a constant (tensor), or an operation on such values.

    trainable: a parameter is among its sources.
    """

    trainable: bool = False
    name: str | None = None
    tensor: Tensor | None = None
    target: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Names an operation of torch instead of holding it, which pickle cannot."""
        named = isinstance(self.target, OpOverload)
        return self.__dict__ | ({"target": _Named(str(self.target))} if named else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Finds the operation by its name."""
        target = state["target"]
        found = target.operation() if isinstance(target, _Named) else target
        self.__dict__.update(state, target=found)

    def value(self, tensors: Mapping[str, Tensor], known: dict[int, Any]) -> Any:
        """Computes the value from the current tensors.

        Args:
            tensors: the model's parameters and buffers by name.
            known: values already computed in this pass, by id.
        """
        if id(self) not in known:
            known[id(self)] = self._compute(tensors, known)
        return known[id(self)]

    def _compute(self, tensors: Mapping[str, Tensor], known: dict[int, Any]) -> Any:
        if self.name is not None:
            return tensors[self.name].detach()
        if self.target is None:
            return self.tensor

        def resolve(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [resolve(item) for item in x]
            return x.value(tensors, known) if isinstance(x, Static) else x

        with torch.no_grad():
            return self.target(*map(resolve, self.args), **{k: resolve(v) for k, v in self.kwargs})


@dataclass(frozen=True, eq=False)
class Scale:
    """A factor on an edge, one entry per channel it was applied to.

    kind "batch_norm": gamma / sqrt(running_var + eps), sources (gamma or None, running_var).
    kind "parameter": the source itself; inverse: 1 / source. kind "number": a constant factor.
    """

    kind: str
    sources: tuple[Static | None, ...] = ()
    eps: float = 0.0
    inverse: bool = False
    number: float = 1.0

    def value(self, tensors: Mapping[str, Tensor], known: dict[int, Any]) -> Tensor:
        """Computes all entries, float64 on the CPU, flat; NaN for parameters on the meta device."""
        if self.kind == "number":
            return torch.tensor([self.number], dtype=torch.float64)
        values = [None if x is None else _on_cpu(x.value(tensors, known)) for x in self.sources]
        if self.kind == "batch_norm":
            gamma, variance = values
            assert variance is not None
            deviation = exact_sqrt(variance + self.eps)
            return 1.0 / deviation if gamma is None else gamma / deviation
        (factor,) = values
        assert factor is not None
        return 1.0 / factor if self.inverse else factor

    def check(self, tensors: Mapping[str, Tensor], known: dict[int, Any], entry: Tensor) -> None:
        """Raises unless these entries are finite; parameters on the meta device are not known."""
        values = [None if x is None else x.value(tensors, known) for x in self.sources]
        if any(x is not None and x.is_meta for x in values):
            return
        if self.kind == "batch_norm":
            gamma, variance = values
            assert variance is not None
            name = f"batch norm {self._module!r}"
            require_batch_norm(gamma, variance, self.eps, name)
            return
        used = self.value(tensors, known)[entry]
        good = used.isfinite()
        if not bool(good.all()):
            index = int((~good).to(torch.uint8).argmax())
            value = 1 / used[index] if self.inverse else used[index]
            whose = " and ".join(repr(name) for name in self.names) or "a constant"
            what = "other than 0, finite, as divisors" if self.inverse else "finite, as factors"
            raise LapValueError(
                f"entries of {whose} that are {what} of channels",
                f"{float(value):g} at index {int(entry[index])}",
                "Repair it.",
            )

    @property
    def _module(self) -> str:
        """The name of the module that holds the sources."""
        return self.names[0].rpartition(".")[0] if self.names else ""

    @property
    def names(self) -> list[str]:
        """Parameters and buffers it is computed from."""
        return [name for x in self.sources if x is not None for name in names_of(x)]


def _on_cpu(x: Tensor) -> Tensor:
    if x.is_meta:
        return torch.full((x.numel(),), torch.nan, dtype=torch.float64)
    return x.to("cpu", torch.float64).flatten()


def names_of(x: Any) -> list[str]:
    """Lists the parameters and buffers that a value is computed from."""
    if isinstance(x, Static):
        own = [x.name] if x.name else []
        given = (*x.args, *(arg for _, arg in x.kwargs))
        return own + [name for arg in given for name in names_of(arg)]
    if isinstance(x, (list, tuple)):
        return [name for item in x for name in names_of(item)]
    return []
