# SPDX-License-Identifier: MIT
"""The diagonal of the Hessian of the mean loss with respect to every weight, by BackPACK.

    h = d^2 (mean loss over all examples) / d w^2        for each weight w on its own

"hessian" is exactly this (DiagHessian) and may be negative. "ggn" (DiagGGNExact) leaves out the
curvature of the network itself: it is never negative, and equals "hessian" where the network is
piecewise linear. BackPACK runs on a copy of the model (chain.py). It is an optional package:
pip install lap_ext[obd].
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
from lap_ext.errors import LapImportError, LapValueError
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
) -> dict[str, Tensor]:
    """Computes the diagonal of the Hessian for every weight.

    Args:
        topology: of the model, a chain of layers that BackPACK supports.
        data: batches (inputs, target).
        loss: one with reduction "mean" that BackPACK supports; None: CrossEntropyLoss.
        curvature: "hessian" or "ggn".

    Returns:
        Layer name -> h of the weight's shape, on its device, float32 (float64 for float64 weights).

    Raises:
        ImportError: BackPACK is not installed.
        ValueError: the model is not such a chain; h is not finite.
        TypeError: a batch is not a pair.
    """
    extend, second_order = _backpack(curvature)
    model, chain = topology.model, None
    measure = extend(nn.CrossEntropyLoss() if loss is None else copy.deepcopy(loss))
    totals: dict[str, Tensor] = {}
    size, examples = [0], 0
    with unchanged(model), torch.inference_mode(False), torch.enable_grad(), _no_hook_warnings():
        for batch in batches(data):
            inputs, target = pair(batch)
            args, kwargs = call_of(model, inputs)
            if chain is None:
                chain = chain_of(topology, program_of(topology, args, kwargs))
                extend(chain.model)
            x = next(_floats(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if not examples:
                _compare(chain, model(*args, **kwargs), x)
                size = list(x.shape[1:])
            _check_size(size, list(x.shape[1:]))
            diagonals = second_order(chain, measure, x, target)
            for name, h in diagonals.items():
                totals[name] = totals[name] + h * len(x) if name in totals else h * len(x)
            examples += len(x)
    return _finite({name: (x / examples).detach() for name, x in totals.items()})


def _backpack(curvature: str) -> tuple[Any, SecondOrder]:
    """Imports BackPACK: its extend, and a function for the diagonals of one batch."""
    try:
        package = import_module("backpack")
        extensions = import_module("backpack.extensions")
    except ImportError as error:
        raise LapImportError(
            "the package BackPACK (it computes the diagonal of the Hessian)",
            "none",
            "Run: pip install 'lap_ext[obd]'.",
        ) from error
    kind = extensions.DiagHessian if curvature == "hessian" else extensions.DiagGGNExact

    def second_order(chain: Chain, loss: nn.Module, x: Tensor, target: Any) -> dict[str, Tensor]:
        extension = kind()
        with package.backpack(extension):
            try:
                loss(chain.model(x), target).backward()
            except NotImplementedError as error:
                raise LapValueError(
                    "layers and a loss that BackPACK can differentiate twice",
                    str(error).rstrip("."),
                    "Use another criterion for this model.",
                ) from error
        diagonals = {}
        for name, parameter in chain.weights.items():
            diagonals[name] = getattr(parameter, extension.savefield)
            delattr(parameter, extension.savefield)
            parameter.grad = None
        return diagonals

    return package.extend, second_order


def _floats(x: Tensor) -> Tensor:
    """Converts an input to the dtype of the chain: float32 (float64 stays float64), detached."""
    return x.detach().to(score_dtype(x.dtype))


def _compare(chain: Chain, expected: Tensor, x: Tensor) -> None:
    """Checks that the chain computes what the model does, within the model's precision."""
    with torch.no_grad():
        output = chain.model(x)
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    close = output.shape == expected.shape and torch.allclose(
        output.double(), expected.detach().double(), rtol=tolerance, atol=tolerance
    )
    if not close:
        raise LapValueError(
            "the copy of the model that BackPACK sees to compute what the model does",
            "other outputs",
            "Use another criterion for this model.",
        )


def _check_size(expected: list[int], got: list[int]) -> None:
    if expected != got:
        raise LapValueError("inputs of one size in all batches", f"{expected} and {got}")


def _finite(diagonals: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, h in diagonals.items():
        if not bool(h.isfinite().all()):
            raise LapValueError(
                "a finite Hessian",
                "inf or NaN",
                "Look for such values in data.",
                layer=name,
            )
    return diagonals


@contextmanager
def _no_hook_warnings() -> Iterator[None]:
    """Silences warnings of hooks whose inputs need no gradient, as in a first layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
