# SPDX-License-Identifier: MIT
"""Models that are wrapped, sharded, compiled, empty or of other dtypes: they work, or it is said
which layer it is and what to do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import lap_ext

X = torch.ones(2, 3)


@pytest.fixture
def _group() -> Iterator[None]:
    """A process group of this process alone, without threads."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("name", list(WRAPPERS))
def test_wrapped_models_are_the_model_inside(name: str) -> None:
    expected = lap_ext.scores(net(), X)
    wrapped = WRAPPERS[name](net())
    assert list(lap_ext.trace(wrapped, X).layers) == ["0", "2"]
    found = lap_ext.scores(wrapped, X)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[layer], x) for layer, x in expected.items())
    result = lap_ext.prune(wrapped, X, 0.5)
    assert lap_ext.sparsity(wrapped) == 0.5
    for model in (net(), WRAPPERS[name](net())):  # masks fit both
        result.apply(model)
        assert lap_ext.sparsity(model) == 0.5
    again = lap_ext.prune(wrapped, X, 0.75, masks=result.masks)
    assert all(bool((result.masks[layer] >= mask).all()) for layer, mask in again.masks.items())


class Complex(nn.Module):
    """A complex layer between real ones, joined by absolute values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4, dtype=torch.cfloat), net()
        self.d = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.d(self.b(self.a(x).to(torch.cfloat)).abs()))


def scripted_part() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 3)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "float8": (
        lambda: net(torch.float8_e4m3fn),
        TypeError,
        "layer '0': expected weights of float32, float64, float16, bfloat16, got float8_e4m3fn. "
        "Convert the model first, as with model.to(torch.bfloat16), or dequantize it.",
    ),
    "complex": (
        Complex,
        TypeError,
        "layer 'b': expected weights of float32, float64, float16, bfloat16, got complex64. Leave "
        "it out: exclude='b' with criterion='magnitude', which reads no neighbors.",
    ),
    "meta": (
        lambda: net().to("meta"),
        ValueError,
        "layer '0': expected weights with values, got one on the meta device. Load them first: "
        "model.to_empty(device='cpu'), then model.load_state_dict(...).",
    ),
}


def calls(model: nn.Module, options: dict[str, Any]) -> list[Callable[[], Any]]:
    """All that score a model."""
    return [
        lambda: lap_ext.scores(model, X, **options),
        lambda: lap_ext.prune(model, X, 0.5, **options),
        lambda: lap_ext.prune(model, X, 0.5, scope="global", **options),
        lambda: lap_ext.Pruner(model, X, lap_ext.one_shot(0.5), **options).step(),
    ]


@pytest.mark.parametrize("criterion", ["lookahead", "random"])
@pytest.mark.parametrize("name", list(REFUSED))
def test_weights_that_cannot_be_scored(name: str, criterion: str) -> None:
    build, error, text = REFUSED[name]
    model = build()
    lap_ext.trace(model, X)  # channels do not depend on values
    for call in calls(model, {"criterion": criterion}):
        with pytest.raises(error, match=re.escape(text)):
            call()


def test_what_the_errors_advise_works() -> None:
    complex_ = Complex()
    with pytest.raises(TypeError, match="layer 'b': expected weights of float32"):
        lap_ext.scores(complex_, X, exclude="b")  # a neighbor of a
    for call in calls(complex_, {"criterion": "magnitude", "exclude": ["b"]}):
        call()
    model, empty = net(), net().to("meta")
    topology = lap_ext.trace(empty, X)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    found = lap_ext.scores(empty, topology=topology)
    assert torch.equal(found["0"], lap_ext.scores(model, X)["0"])
    converted = net(torch.float8_e4m3fn).to(torch.bfloat16)
    assert lap_ext.prune(converted, X.bfloat16(), 0.5).kept == 10


@pytest.mark.filterwarnings("ignore:.*(NO_SHARD|torch.jit|FSDP)")
@pytest.mark.usefixtures("_group")
def test_models_that_cannot_be_traced() -> None:
    models: list[tuple[nn.Module, str]] = [
        (
            FullyShardedDataParallel(net(), device_id=torch.device("cpu")),
            "expected whole parameters in each process, got FullyShardedDataParallel around the "
            "model. Prune the model before it is sharded, or a copy with the full state dict.",
        ),
        (fully_shard(net()), "layer '0': expected whole parameters in each process, got a DTensor"),
        (torch.jit.script(net()), "got a RecursiveScriptModule as the model. Build the model from"),
        (torch.jit.trace(net(), X), "got a TopLevelTracedModule as the model. Build the model"),
        (scripted_part(), "got a RecursiveScriptModule as module '1'. Build the model from its"),
        (
            nn.Sequential(nn.LazyLinear(4)),
            "layer '0': expected parameters with a shape, got one that is not initialized. Run the "
            "model once on a batch.",
        ),
    ]
    for model, text in models:
        for call in (lambda m=model: lap_ext.trace(m, X), *calls(model, {})):
            with pytest.raises(lap_ext.TopologyError, match=re.escape(text)):
                call()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:All scores are 0")
@pytest.mark.parametrize("criterion", ["lookahead", "random"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 0)),
        lambda: nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 8), nn.Linear(8, 2)),
    ],
    ids=["without_outputs", "without_inputs"],
)
def test_layers_without_weights(build: Callable[[], nn.Module], criterion: str) -> None:
    """They have none to keep, and the others are pruned as usual."""
    model = build()
    for scope in ("layer", "global"):
        result = lap_ext.prune(copy.deepcopy(model), X, 0.5, scope=scope, criterion=criterion)
        kept = {row.name: row.kept for row in result.layers}
        assert sum(kept.values()) == sum(x.numel() for x in result.masks.values()) / 2
        empty = [name for name, mask in result.masks.items() if mask.numel() == 0]
        assert empty and all(kept[name] == 0 for name in empty)
    assert "0" in str(lap_ext.trace(model, X))


def test_inputs_on_another_device_than_the_model() -> None:
    topology = lap_ext.trace(net().to("meta"), X)
    assert [edge.name for edge in topology.layers["0"].next] == ["2"]
    half = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"))
    with pytest.raises(lap_ext.TopologyError, match="same device"):
        lap_ext.trace(half, X)


class Towers(nn.Module):
    """Two branches; the second has a tied pair and runs only where it has an input."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.again = nn.Linear(3, 2), nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight = self.image.weight
        self.place, self.spare = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 2))

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        y = self.text(text) + self.place
        return y if image is None else y + self.again(self.image(image)).sum(-1, keepdim=True)


def test_weights_that_the_inputs_do_not_reach() -> None:
    alone, both = (lap_ext.trace(Towers(), inputs) for inputs in (X, (X, X)))
    assert alone.unreached == ("spare", "image.weight") and both.unreached == ("spare",)
    assert alone.others == ["place", "spare", "image.weight"]
    assert str(alone).endswith(
        "no layers, never pruned: place\n"
        "not reached by the example inputs, never pruned: spare, image.weight"
    )
