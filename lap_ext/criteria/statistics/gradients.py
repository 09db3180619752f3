# SPDX-License-Identifier: MIT
"""Gradients of a loss with respect to every weight, summed over batches.

The model is run as it is, in evaluation mode; nothing of it is changed, its .grad fields included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from lap_ext.criteria.statistics.isolation import unchanged
from lap_ext.criteria.statistics.replay import batches, call_of
from lap_ext.ops.reference.common import score_dtype
from lap_ext.topology import Topology

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]


def weight_gradients(
    topology: Topology, data: Any, loss: Loss | None, *, function: str, criterion: str
) -> dict[str, Tensor]:
    """Sum over batches of d loss(model, batch) / d weight, signed.

    Args:
        topology: of the model.
        data: batches, as the loss takes them: (inputs, target) for the default.
        loss: (model, batch) -> a scalar; None: cross entropy of model(inputs) and target.
        function: whose name errors carry.
        criterion: whose name errors carry.

    Returns:
        Layer name -> gradient of the weight's shape, on its device, float32 (float64 for float64
        weights); zeros where the loss does not depend on the weight. Weights that do not require
        grad have none.

    Raises:
        ValueError: the loss is no scalar or has no gradient; a gradient is not finite.
        TypeError: a batch of the default loss is no pair.
    """
    model = topology.model
    weights = {
        name: layer.weight for name, layer in topology.layers.items() if layer.weight.requires_grad
    }
    totals = {name: torch.zeros_like(w, dtype=score_dtype(w.dtype)) for name, w in weights.items()}
    if not weights:
        return {}
    with unchanged(model), torch.inference_mode(False), torch.enable_grad(), _no_cudnn_rnn(model):
        for batch in batches(data, function, criterion):
            value = cross_entropy(model, batch, function) if loss is None else loss(model, batch)
            _scalar(value, function)
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), found, strict=True):
                if gradient is not None:
                    total.add_(gradient)
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"{function}: expected finite gradients, got inf or NaN for layer {name!r}. Look "
                "for such values in data, or scale the loss."
            )
    return totals


def cross_entropy(model: nn.Module, batch: Any, function: str) -> Tensor:
    """The default loss: mean cross entropy of model(inputs) and target, batch (inputs, target)."""
    inputs, target = pair(batch, function)
    args, kwargs = call_of(model, inputs, function)
    output = model(*args, **kwargs)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{function}: expected a model that returns a tensor of logits for the default loss, "
            f"got {type(output).__name__}. Pass a loss of (model, batch), as in "
            "WeightGradient(loss=lambda model, batch: model(**batch).loss)."
        )
    return F.cross_entropy(output, target)


def pair(batch: Any, function: str) -> tuple[Any, Any]:
    """A batch as (inputs, target)."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(
            f"{function}: expected each batch of data to be (inputs, target), got {got}. Pass a "
            "loss of your own for other batches."
        )
    return batch[0], batch[1]


def _scalar(value: Any, function: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{function}: expected the loss to return a scalar tensor, got {got}. Take its mean."
        )
    if not value.requires_grad:
        raise ValueError(
            f"{function}: expected a loss with a gradient, got one that does not depend on any "
            "weight that requires grad. Compute it with the model that loss is given, without "
            "torch.no_grad()."
        )


def _no_cudnn_rnn(model: nn.Module) -> AbstractContextManager[Any]:
    """CuDNN has no backward of recurrent layers in evaluation mode."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()
