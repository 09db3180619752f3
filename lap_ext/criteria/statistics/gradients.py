# SPDX-License-Identifier: MIT
"""Gradients of a loss with respect to every weight, summed over batches.

The model is run in evaluation mode and left unchanged, its .grad fields included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from lap_ext.computed import as_parameters
from lap_ext.criteria.statistics.isolation import unchanged
from lap_ext.criteria.statistics.replay import batches, call_of
from lap_ext.errors import LapTypeError, LapValueError, callback
from lap_ext.ops.reference.common import score_dtype
from lap_ext.topology import Topology

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]


def weight_gradients(topology: Topology, data: Any, loss: Loss | None) -> dict[str, Tensor]:
    """Sums d loss(model, batch) / d weight over the batches, signed.

    Args:
        topology: of the model.
        data: batches, as the loss takes them: (inputs, target) for the default.
        loss: (model, batch) -> a scalar; None: cross entropy of model(inputs) and target.

    Returns:
        Layer name -> gradient of the weight's shape, on its device, float32 (float64 for float64
        weights); zeros where the loss does not depend on the weight. Weights that do not require
        grad have none.

    Raises:
        ValueError: the loss is not a scalar or has no gradient; a gradient is not finite.
        TypeError: a batch of the default loss is not a pair.
    """
    with as_parameters(topology.model, requires_grad=True):
        return _summed(topology, data, loss)


def _summed(topology: Topology, data: Any, loss: Loss | None) -> dict[str, Tensor]:
    """Sums the gradients with respect to parameters, of which every weight is now one."""
    model = topology.model
    weights = {
        name: layer.weight for name, layer in topology.layers.items() if layer.weight.requires_grad
    }
    totals = {name: torch.zeros_like(w, dtype=score_dtype(w.dtype)) for name, w in weights.items()}
    if not weights:
        return {}
    with unchanged(model), torch.inference_mode(False), torch.enable_grad(), _no_cudnn_rnn(model):
        for batch in batches(data):
            value = cross_entropy(model, batch) if loss is None else _called(loss, model, batch)
            _check_scalar(value)
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient)
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise LapValueError(
                "finite gradients",
                "inf or NaN",
                "Look for such values in data, or scale the loss.",
                layer=name,
            )
    return totals


@callback()
def _called(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """Calls a loss of the user's."""
    return loss(model, batch)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Computes the default loss, the mean cross entropy, of a batch (inputs, target)."""
    inputs, target = pair(batch)
    args, kwargs = call_of(model, inputs)
    output = model(*args, **kwargs)
    if not isinstance(output, Tensor):
        raise LapValueError(
            "a model that returns a tensor of logits for the default loss",
            type(output).__name__,
            (
                "Pass a loss of (model, batch), as in WeightGradient(loss=lambda model, batch: "
                "model(**batch).loss)."
            ),
        )
    return F.cross_entropy(output, target)


def pair(batch: Any) -> tuple[Any, Any]:
    """Checks that a batch is (inputs, target), and returns them."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise LapTypeError(
            "each batch of data to be (inputs, target)",
            got,
            "Pass a loss of your own for other batches.",
        )
    return batch[0], batch[1]


def _check_scalar(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LapValueError("the loss to return a scalar tensor", got, "Take its mean.")
    if not value.requires_grad:
        raise LapValueError(
            "a loss with a gradient",
            "one that does not depend on any weight that requires grad",
            "Compute it with the model that loss is given, without torch.no_grad().",
        )


def _no_cudnn_rnn(model: nn.Module) -> AbstractContextManager[Any]:
    """Turns cuDNN off for recurrent layers: it has no backward for them in evaluation mode."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()
