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
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lap_ext.chain import Chain, chain_of
from lap_ext.gradients import pair
from lap_ext.purity import unchanged
from lap_ext.replay import batches, call_of
from lap_ext.topology import Topology

CURVATURES = ("hessian", "ggn")


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
        loss: a loss module with reduction "mean" that BackPACK knows: CrossEntropyLoss (None) or
            MSELoss.
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
    extend, backpack, extension = _backpack(curvature, function, criterion)
    model = topology.model
    chain: Chain | None = None
    totals: dict[str, Tensor] = {}
    examples = 0
    measure = extend(nn.CrossEntropyLoss() if loss is None else copy.deepcopy(loss))
    with unchanged(model), torch.inference_mode(False), torch.enable_grad(), _quiet():
        for batch in batches(data, function, criterion):
            inputs, target = pair(batch, function)
            args, kwargs = call_of(model, inputs, function)
            if chain is None:
                chain = chain_of(topology, args, kwargs, function)
            x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if examples == 0:
                _compare(chain, model(*args, **kwargs), _wide(x), function)
                extend(chain.model)
                size = x.shape[1:]
            if x.shape[1:] != size:
                raise ValueError(
                    f"{function}: expected inputs of one size in all batches, got "
                    f"{list(size)} and {list(x.shape[1:])}."
                )
            for parameter in chain.weights.values():
                parameter.grad = None
            _backward(backpack(extension), measure, chain.model(_wide(x)), target, function)
            examples += len(x)
            for name, parameter in chain.weights.items():
                found = getattr(parameter, extension.savefield) * len(x)
                totals[name] = totals[name] + found if name in totals else found
                delattr(parameter, extension.savefield)
    result = {name: (total / examples).detach() for name, total in totals.items()}
    for name, h in result.items():
        if not bool(h.isfinite().all()):
            raise ValueError(
                f"{function}: expected a finite Hessian, got inf or NaN for layer {name!r}. Look "
                "for such values in data."
            )
    return result


def _backpack(curvature: str, function: str, criterion: str) -> tuple[Any, Any, Any]:
    try:
        package = import_module("backpack")
        extensions = import_module("backpack.extensions")
    except ImportError as error:
        raise ImportError(
            f"{function}: expected the package BackPACK for criterion {criterion!r} (it computes "
            "the diagonal of the Hessian), got none. Run: pip install 'lap_ext[obd]'."
        ) from error
    kind = extensions.DiagHessian if curvature == "hessian" else extensions.DiagGGNExact
    return package.extend, package.backpack, kind()


def _backward(
    second_order: AbstractContextManager[Any],
    loss: nn.Module,
    output: Tensor,
    target: Any,
    function: str,
) -> None:
    with second_order:
        try:
            loss(output, target).backward()
        except NotImplementedError as error:
            raise ValueError(
                f"{function}: expected layers and a loss that BackPACK can differentiate twice, "
                f"got: {error} Use curvature='ggn' or another criterion for this model."
            ) from error


def _wide(x: Tensor) -> Tensor:
    """As the chain computes: float32, float64 for float64; a leaf of its own."""
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)


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


class _quiet(warnings.catch_warnings):  # noqa: N801 (used as a function)
    """Without the warnings of hooks whose inputs need no gradient: those of a first layer."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
