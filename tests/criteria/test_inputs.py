# SPDX-License-Identifier: MIT
"""The inputs that statistics see are those of the model's own calls, in every family of the zoo."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.overrides import TorchFunctionMode

from lap_ext.criteria.statistics.activations import mean_squares
from tests.helpers.topologies import ENTRIES, traced

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
CONVOLUTIONS |= {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
FAMILIES = {  # entry -> layers that are called as F.linear or F.conv with a parameter
    "autoencoder": 5,
    "crnn": 2,
    "decoder_gqa": 14,
    "densenet": 13,
    "hf_llama_padded": 15,
    "hf_mixtral_grouped_mm": 11,
    "hf_t5_eager": 33,
    "mobilenet_v3": 21,
    "moe_bmm": 11,
    "nano_gpt": 5,
    "resnet_bottleneck": 16,
    "shufflenet_v2": 14,
    "swin": 15,
    "unet_transposed": 13,
    "vit_mha": 6,
}


class Calls(TorchFunctionMode):
    """Sums of squares of what linear layers and convolutions are called with, by layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = list(model.named_parameters(remove_duplicate=False))
        self.names = {id(p): name.removesuffix(".weight") for name, p in reversed(named)}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (func is F.linear or func in CONVOLUTIONS) and id(args[1]) in self.names:
            x, weight = args[:2]
            dim = x.dim() - 1 - (0 if func is F.linear else weight.dim() - 2)
            rows = x.detach().double().movedim(dim, -1).reshape(-1, x.shape[dim])
            name = self.names[id(weight)]
            self.sums[name] = self.sums.get(name, 0) + rows.square().sum(0)
            self.counts[name] = self.counts.get(name, 0) + len(rows)
        return func(*args, **(kwargs or {}))


def test_experts_whose_rows_are_sorted_or_picked() -> None:
    """Two implementations of one model: sorted rows, or the weights of each row's expert."""
    pytest.importorskip("transformers", reason="a mixture of experts of transformers")
    found = []
    for name in ("hf_mixtral_batched_mm", "hf_mixtral_grouped_mm"):
        model, args, kwargs = ENTRIES[name].make()
        topology = traced(name)
        names = list(inspect.signature(model.forward).parameters)
        batch = {**dict(zip(names, args, strict=False)), **kwargs}
        means = mean_squares(topology, [batch])
        experts = [
            x
            for role, x in zip(topology.roles, means, strict=True)
            if role.layer.endswith("experts.gate_up_proj")
        ]
        found.append(torch.cat(experts))
    assert len(found[0].reshape(2, 3, -1)[0].unique(dim=0)) == 3  # each has rows of its own
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_inputs_are_those_of_the_calls(name: str) -> None:
    topology = traced(name)
    model = topology.model
    _, args, kwargs = ENTRIES[name].make()
    names = list(inspect.signature(model.forward).parameters)
    batch = {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else args
    measured: dict[str, list[Tensor]] = {}
    found = mean_squares(topology, [batch])
    for role, x in zip(topology.roles, found, strict=True):
        if role.kind != "embedding":  # the other use of a tied weight
            measured.setdefault(role.layer, []).append(x)
    if "use_cache" in names:
        kwargs = {**kwargs, "use_cache": False}
    with torch.no_grad(), Calls(model) as calls:
        model(*args, **kwargs)
    assert len(calls.sums) == FAMILIES[name]
    for layer, total in calls.sums.items():
        mean = sum(measured[layer]) / len(measured[layer])
        torch.testing.assert_close(mean, total / calls.counts[layer], rtol=1e-3, atol=1e-6)
