# SPDX-License-Identifier: MIT
"""The diagonal of the Hessian of the mean loss with respect to every weight, by BackPACK.

    h = d^2 (mean over all examples of the loss) / d w^2        of each weight w by itself

"hessian" is that exactly (DiagHessian), and may be negative. "ggn" (DiagGGNExact) leaves out the
curvature of the network itself: never negative, and the same where the network is piecewise linear.
BackPACK sees a copy of the model (chain.py). It is an optional package: pip install lap_ext[obd].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lap_ext.criteria.statistics.chain import Chain, chain_of
from lap_ext.criteria.statistics.gradients import pair
from lap_ext.criteria.statistics.isolation import unchanged
from lap_ext.criteria.statistics.replay import batches, call_of, program_of
from lap_ext.ops.reference.common import score_dtype
from lap_ext.topology import Topology

CURVATURES = ("hessian", "ggn")
# (chain, loss, inputs, target) -> layer name -> diagonal for the mean loss of this batch
SecondOrder: TypeAlias = Callable[[Chain, nn.Module, Tensor, Any], dict[str, Tensor]]


def hessian_diagonals(
    topology: Topology,
    data: Any,
    loss: nn.Module | None,
    curvature: str,
    *,
    function: str,
    criterion: str,
) -> dict[str, Tensor]:
    """The Hessian's diagonal of every weight.

    Args:
        topology: of the model, a chain of layers that BackPACK knows.
        data: batches (inputs, target).
        loss: one with reduction "mean" that BackPACK knows; None: CrossEntropyLoss.
        curvature: "hessian" or "ggn".
        function: whose name errors carry.
        criterion: whose name errors carry.

    Returns:
        Layer name -> h of the weight's shape, on its device, float32 (float64 for float64 weights).

    Raises:
        ImportError: BackPACK is not installed.
        ValueError: the model is no such chain; h is not finite.
        TypeError: a batch is no pair.
    """
    extend, second_order = _backpack(curvature, function, criterion)
    model, chain = topology.model, None
    measure = extend(nn.CrossEntropyLoss() if loss is None else copy.deepcopy(loss))
    totals: dict[str, Tensor] = {}
    size, examples = [0], 0
    with unchanged(model), torch.inference_mode(False), torch.enable_grad(), _quiet():
        for batch in batches(data, function, criterion):
            inputs, target = pair(batch, function)
            args, kwargs = call_of(model, inputs, function)
            if chain is None:
                chain = chain_of(topology, program_of(topology, args, kwargs, function), function)
                extend(chain.model)
            x = next(_wide(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if not examples:
                _compare(chain, model(*args, **kwargs), x, function)
                size = list(x.shape[1:])
            _one_size(size, list(x.shape[1:]), function)
            found = second_order(chain, measure, x, target)
            for name, h in found.items():
                totals[name] = totals[name] + h * len(x) if name in totals else h * len(x)
            examples += len(x)
    return _finite({name: (x / examples).detach() for name, x in totals.items()}, function)


def _backpack(curvature: str, function: str, criterion: str) -> tuple[Any, SecondOrder]:
    """BackPACK's extend, and what gives the diagonals of one batch."""
    try:
        package = import_module("backpack")
        extensions = import_module("backpack.extensions")
    except ImportError as error:
        raise ImportError(
            f"{function}: expected the package BackPACK for criterion {criterion!r} (it computes "
            "the diagonal of the Hessian), got none. Run: pip install 'lap_ext[obd]'."
        ) from error
    kind = extensions.DiagHessian if curvature == "hessian" else extensions.DiagGGNExact

    def second_order(chain: Chain, loss: nn.Module, x: Tensor, target: Any) -> dict[str, Tensor]:
        extension = kind()
        with package.backpack(extension):
            try:
                loss(chain.model(x), target).backward()
            except NotImplementedError as error:
                raise ValueError(
                    f"{function}: expected layers and a loss that BackPACK can differentiate "
                    f"twice, got: {error} Use another criterion for this model."
                ) from error
        found = {}
        for name, parameter in chain.weights.items():
            found[name] = getattr(parameter, extension.savefield)
            delattr(parameter, extension.savefield)
            parameter.grad = None
        return found

    return package.extend, second_order


def _wide(x: Tensor) -> Tensor:
    """As the chain computes: float32, float64 for float64; a leaf of its own."""
    return x.detach().to(score_dtype(x.dtype))


def _compare(chain: Chain, expected: Tensor, x: Tensor, function: str) -> None:
    """The chain computes what the model does, as far as its precision goes."""
    with torch.no_grad():
        found = chain.model(x)
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    close = found.shape == expected.shape and torch.allclose(
        found.double(), expected.detach().double(), rtol=tolerance, atol=tolerance
    )
    if not close:
        raise ValueError(
            f"{function}: expected the copy of the model that BackPACK sees to compute what the "
            "model does, got other outputs. Use another criterion for this model."
        )


def _one_size(expected: list[int], got: list[int], function: str) -> None:
    if expected != got:
        raise ValueError(
            f"{function}: expected inputs of one size in all batches, got {expected} and {got}."
        )


def _finite(diagonals: dict[str, Tensor], function: str) -> dict[str, Tensor]:
    for name, h in diagonals.items():
        if not bool(h.isfinite().all()):
            raise ValueError(
                f"{function}: expected a finite Hessian, got inf or NaN for layer {name!r}. Look "
                "for such values in data."
            )
    return diagonals


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of hooks whose inputs need no gradient: those of a first layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
