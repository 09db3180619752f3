# SPDX-License-Identifier: MIT
"""A small network, masks for it, and the model the masks must agree with: weight * mask."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lap_ext
from lap_ext.masks import Masks


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Conv, two linear layers, something smooth between them."""
    layers = OrderedDict(
        conv=nn.Conv2d(1, 4, 3),
        act=nn.Tanh(),
        flat=nn.Flatten(),
        fc1=nn.Linear(4 * 4 * 4, 8),
        act2=nn.Tanh(),
        fc2=nn.Linear(8, 3),
    )
    return nn.Sequential(layers).to(dtype)


def random_masks(model: nn.Module, names: tuple[str, ...] = ("conv", "fc1", "fc2")) -> Masks:
    """Half of each layer, at random."""
    return Masks(
        {name: torch.rand(model.get_parameter(f"{name}.weight").shape) < 0.5 for name in names}
    )


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 1, 6, 6, dtype=dtype), torch.randint(3, (6,))) for _ in range(count)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]
) -> None:
    """One step a batch, through a closure (LBFGS needs one, all others take one)."""
    for batch in data:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class Multiply(nn.Module):
    """The weight times its mask, as a parametrization."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[list[Callable[[], Tensor]]],
    schedule: Callable[[int], Any],
    masks: Any,
    *,
    example: Any,
    clip: float,
) -> tuple[Masks, list[float]]:
    """Trains by hand, each step its losses: (masks, norms of the gradients of weights left)."""
    masks = Masks({} if masks is None else masks)
    handle = masks.keep(model, optimizer) if masks else None
    norms = []
    for step, losses in enumerate(steps):
        for loss in losses:
            (loss() / len(losses)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
        if schedule(step) is not None:
            masks = lap_ext.prune(model, example, schedule(step), masks=masks).masks
            if handle is not None:
                handle.remove()
            handle = masks.keep(model, optimizer)
    return masks, norms


def check_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def multiplied(model: nn.Module, masks: Masks) -> nn.Module:
    """The model, its weights multiplied by the masks in each forward pass."""
    for name, mask in masks.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", Multiply(mask))
    return model


def in_order(model: nn.Module) -> list[nn.Parameter]:
    """Weight before bias, as in the plain model: LBFGS adds products over all of them in order."""
    parameters = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parameters += [module.parametrizations.weight.original, module.bias]
    return parameters


def check_zero(model: nn.Module, masks: Masks) -> None:
    """Pruned weights are +0.0, bit for bit, and kept ones were not lost."""
    for name, mask in masks.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        pruned = weight[~mask]
        assert torch.equal(pruned, torch.zeros_like(pruned)), name
        assert not pruned.signbit().any(), name
        assert weight[mask].count_nonzero() > 0 or not mask.any(), name


def check_agree(kept: nn.Module, multiplied: nn.Module, masks: Masks) -> None:
    """The same kept weights and biases, to the last bit."""
    for name, mask in masks.items():
        mine, theirs = kept.get_submodule(name), multiplied.get_submodule(name)
        assert torch.equal(mine.weight[mask], theirs.weight[mask]), name
        assert torch.equal(mine.bias, theirs.bias), name


Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

O = torch.optim  # noqa: E741 (a table is read by its columns)
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: O.SGD(p, 0.1),
    "momentum": lambda p: O.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: O.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-foreach": lambda p: O.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: O.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: O.Adam(p, 0.01),
    "adam-amsgrad": lambda p: O.Adam(p, 0.01, amsgrad=True, weight_decay=0.01),
    "adam-foreach": lambda p: O.Adam(p, 0.01, foreach=True),
    "adamw": lambda p: O.AdamW(p, 0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: O.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: O.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamax": lambda p: O.Adamax(p, 0.01),
    "nadam": lambda p: O.NAdam(p, 0.01, weight_decay=0.01),
    "radam": lambda p: O.RAdam(p, 0.01),
    "rmsprop": lambda p: O.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: O.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "adagrad-fused": lambda p: O.Adagrad(p, 0.1, fused=True),
    "adadelta": O.Adadelta,
    "adafactor": lambda p: O.Adafactor(p, 0.01),
    "asgd": lambda p: O.ASGD(p, 0.1, t0=2),
    "rprop": lambda p: O.Rprop(p, 0.01),
    "lbfgs": lambda p: O.LBFGS(p, 0.1, max_iter=5, history_size=3),
    "lbfgs-wolfe": lambda p: O.LBFGS(p, 0.5, max_iter=5, line_search_fn="strong_wolfe"),
}
