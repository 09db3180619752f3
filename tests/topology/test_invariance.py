# SPDX-License-Identifier: MIT
"""What must not matter, and what tracing must leave alone.

The order of channels, the scale of hidden channels, the sizes of the example inputs, how a model is
written, and its mode and type must not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests import zoo
from tests.helpers.networks import Net, randomized
from tests.helpers.topologies import ENTRIES, traced


def made(name: str) -> tuple[nn.Module, Any, Any]:
    if name.startswith("hf"):
        pytest.importorskip("transformers", minversion="5")
    return ENTRIES[name].make()


def scored(name: str) -> dict[str, Tensor]:
    topology = traced(name)
    return lap_ext.scores(topology.model, topology=topology)


# ---- a timestep ----------------------------------------------------------------------------------
def denoised(m: Any, x: Tensor, t: Any) -> Tensor:
    """A small diffusion model, as diffusers writes it: its timestep's embedding is added."""
    if not isinstance(t, Tensor):
        t = torch.tensor([t], dtype=torch.float64 if isinstance(t, float) else torch.int64)
    t = (t if t.dim() else t[None]).expand(x.shape[0])
    angles = t[:, None].float() * torch.exp(-torch.arange(2.0) * 3.5)
    embedding = m.t2(F.silu(m.t1(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))))
    h = m.inlet(x) + m.shift(F.silu(embedding))[:, :, None, None]
    return m.outlet(F.silu(m.mid(h)))


def test_a_timestep_of_any_type() -> None:
    """Integer or float, one or one an example: the same topology, so the same masks."""
    layers = {"t1": nn.Linear(4, 6), "t2": nn.Linear(6, 6), "shift": nn.Linear(6, 4)}
    convs = {"inlet": nn.Conv2d(3, 4, 3, padding=1), "mid": nn.Conv2d(4, 4, 1)}
    model = Net(denoised, **layers, **convs, outlet=nn.Conv2d(4, 3, 1))
    x = torch.randn(2, 3, 4, 4)
    expected = lap_ext.trace(model, (x, 10))
    for t in (10.0, torch.tensor(10), torch.tensor(10.0), torch.tensor([10.0, 3.0])):
        topology = lap_ext.trace(model, (x, t))
        assert str(topology) == str(expected)
        scores = lap_ext.scores(model, topology=topology)
        assert all(torch.equal(y, scores[k])
                   for k, y in lap_ext.scores(model, topology=expected).items())  # fmt: skip


# ---- channels ---------------------------------------------------------------------------------
class Small(nn.Module):
    """Six hidden channels: a convolution and its norm write, two layers and a gate read them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.depth, self.mix = nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.Conv2d(6, 4, 1)
        self.gate, self.head = nn.Linear(6, 4), nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4, 4]
        x = F.relu(self.norm(self.stem(x)))
        y = self.mix(self.depth(x)) * self.gate(x.mean((2, 3))).sigmoid()[..., None, None]
        return self.head(y.flatten(1))


IMAGES = torch.randn(2, 3, 4, 4, dtype=torch.float64)


@cache
def small() -> tuple[Small, lap_ext.Topology, dict[str, Tensor]]:
    """The net, its topology and its values."""
    torch.manual_seed(0)
    model = randomized(Small())
    values = {key: x.clone() for key, x in model.state_dict().items()}
    return model, lap_ext.trace(model, IMAGES), values


@torch.no_grad()
def permuted(model: Small, order: Tensor) -> None:
    """The same function, the six channels in another order."""
    for name in ("stem", "norm", "depth"):
        for x in getattr(model, name).state_dict().values():
            if x.dim():
                x.copy_(x[order])
    for layer in (model.mix, model.gate):
        layer.weight.copy_(layer.weight[:, order])


@given(order=st.permutations(range(6)))
def test_the_order_of_channels(order: list[int]) -> None:
    model, topology, start = small()
    model.load_state_dict(start)
    before, y, index = lap_ext.scores(model, topology=topology), model(IMAGES), torch.tensor(order)
    permuted(model, index)
    torch.testing.assert_close(model(IMAGES), y)
    expected = dict(before)
    for name in ("stem", "depth"):
        expected[name] = before[name][index]
    for name in ("mix", "gate"):
        expected[name] = before[name][:, index]
    torch.testing.assert_close(
        lap_ext.scores(model, topology=topology), expected, rtol=1e-13, atol=0
    )


@cache
def chain() -> tuple[nn.Module, lap_ext.Topology, dict[str, Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Linear(i, o) for i, o in ((4, 6), (6, 5), (5, 7), (7, 3))]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))
    values = {key: x.clone() for key, x in model.state_dict().items()}
    return model, lap_ext.trace(model, torch.randn(1, 4)), values


@given(powers=st.lists(st.integers(-6, 6), min_size=5, max_size=5))
def test_the_scale_of_a_hidden_space(powers: list[int]) -> None:
    """Rows of the producer times s, columns of the consumer over s: neither one's mask changes.

    With powers of two every score stays bit by bit: (|w| s) * (norm / s).
    """
    model, topology, start = chain()
    model.load_state_dict(start)
    before = lap_ext.scores(model, topology=topology)
    kept = lap_ext.prune(model, None, 0.6, topology=topology, apply=False).masks
    scale = 2.0 ** torch.tensor(powers)
    with torch.no_grad():
        model[2].weight.mul_(scale[:, None])
        model[4].weight.div_(scale)
    after = lap_ext.scores(model, topology=topology)
    again = lap_ext.prune(model, None, 0.6, topology=topology, apply=False).masks
    for name in ("2", "4"):
        assert torch.equal(after[name], before[name]) and torch.equal(again[name], kept[name])
    if any(powers):  # one hop further out the norms mix rescaled channels
        assert not torch.equal(after["0"], before["0"])


# ---- example inputs ---------------------------------------------------------------------------
SIZES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "mlp": lambda: (torch.randn(7, 12),),
    "resnet_basic": lambda: (torch.randn(1, 3, 48, 40),),
    "densenet": lambda: (torch.randn(3, 3, 48, 32),),
    "mobilenet_v3": lambda: (torch.randn(1, 3, 64, 40),),
    "unet_bilinear": lambda: (torch.randn(1, 3, 13, 18),),
    "super_resolution": lambda: (torch.randn(3, 3, 12, 6),),
    "shufflenet_v2": lambda: (torch.randn(1, 3, 40, 64),),
    "lstm_bidirectional": lambda: (torch.randint(0, 11, (3, 9)),),
    "crnn": lambda: (torch.randn(1, 1, 6, 30),),
    "textcnn": lambda: (torch.randint(0, 11, (1, 13)),),
    "wavenet": lambda: (torch.randn(3, 1, 17),),
    "transformer": lambda: (torch.randint(0, 11, (1, 9)), torch.randint(0, 9, (1, 3))),
    "nano_gpt": lambda: (torch.randint(0, 11, (3, 9)),),
    "decoder_gqa": lambda: (torch.randint(0, 11, (1, 11)),),
    "moe_bmm": lambda: (torch.randint(0, 11, (3, 4)),),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_of_the_example_inputs(name: str) -> None:
    """Batch, image, length of the text: the scores are the same to the bit."""
    result = lap_ext.scores(traced(name).model, SIZES[name]())
    expected = scored(name)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[layer], expected[layer]) for layer in result)


@pytest.mark.parametrize("name", ["hf_llama_sdpa", "hf_t5_sdpa"])
def test_sizes_of_named_example_inputs(name: str) -> None:
    topology = traced(name)
    ids = {"input_ids": torch.randint(3, 13, (1, 9)), "attention_mask": torch.ones(1, 9).long()}
    if name == "hf_t5_sdpa":
        ids["decoder_input_ids"] = torch.randint(3, 13, (1, 4))
    result = lap_ext.scores(topology.model, ids)
    torch.testing.assert_close(result, scored(name), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "resnet_basic", "vit_sdpa"])
def test_one_tensor_or_a_tuple(name: str) -> None:
    model, args, _ = made(name)
    expected = scored(name)
    for inputs in (args, list(args), args[0]):
        torch.testing.assert_close(lap_ext.scores(model, inputs), expected, rtol=0, atol=0)


# ---- how a model is written ---------------------------------------------------------------------
def functional(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    h = h + m.b(h)
    h = F.hardtanh(h * 2) - m.c(h)
    return m.d(F.dropout(F.silu(h), training=m.training))


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu_()
    h += m.b(h)
    other = m.c(h)
    h.mul_(2)
    F.hardtanh(h, inplace=True)
    h.sub_(other)
    F.dropout(F.silu(h, inplace=True), training=m.training, inplace=True)
    return m.d(h)


def views(m: Any, x: Tensor) -> Tensor:
    """A view is taken before its tensor is written."""
    h = m.a(x)
    flat = h.view(-1)
    h.relu_()
    h += m.b(h)
    h = h * 2
    flat = h.view(2, 6)
    h.clamp_(-1, 1).sub_(m.c(h / 2))
    F.silu(flat, inplace=True)
    return m.d(flat)


def test_in_place_and_functional() -> None:
    layers = {name: nn.Linear(6, 6) for name in "abcd"}
    x = torch.randn(2, 6)
    expected = lap_ext.scores(Net(functional, **layers).eval(), x)
    topology = lap_ext.trace(Net(functional, **layers).eval(), x)
    for rule in (in_place, views):
        model = Net(rule, **layers).eval()
        torch.testing.assert_close(lap_ext.scores(model, x), expected, rtol=0, atol=0)
        other = lap_ext.trace(model, x)
        for name, layer in topology.layers.items():
            result = [(edge.name, edge.channel_map) for edge in other.layers[name].prev]
            assert result == [(edge.name, edge.channel_map) for edge in layer.prev]


def test_a_view_of_what_is_written_later() -> None:
    """The flattened tensor has the residual branch as well, though it was flattened before."""

    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        flat = h.flatten(1)
        h.add_(m.b(x))
        return m.c(flat)

    model = Net(rule, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Linear(64, 2))
    topology = lap_ext.trace(model, IMAGES.float())
    assert [edge.name for edge in topology.layers["c"].prev] == ["a", "b"]


def test_modules_and_functions() -> None:
    model = made("lenet")[0]
    layers = [*(model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(inplace=True)),
              *(nn.MaxPool2d(2), nn.Flatten(), model.fc1, nn.ReLU(), model.fc2, nn.ReLU(),
                model.fc3)]  # fmt: skip
    result = lap_ext.scores(nn.Sequential(*layers), torch.randn(2, 1, 24, 28))
    torch.testing.assert_close([*result.values()], [*scored("lenet").values()], rtol=0, atol=0)


PAIRS = [("vit_sdpa", "vit_by_hand"), ("hf_bert_eager", "hf_bert_sdpa"),
         ("hf_gpt2_eager", "hf_gpt2_sdpa"), ("hf_llama_eager", "hf_llama_sdpa"),
         ("hf_t5_eager", "hf_t5_sdpa"), ("hf_llama_sdpa", "hf_llama_padded"),
         ("hf_mixtral_batched_mm", "hf_mixtral_grouped_mm"), ("moe_einsum", "moe_bmm")]  # fmt: skip


@pytest.mark.parametrize("one, other", PAIRS)
def test_two_ways_of_writing_a_model(one: str, other: str) -> None:
    """Attention written out or fused, with padding or without, experts one way or another."""
    first, second = scored(one), scored(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=0)


# ---- types, modes, memory formats ----------------------------------------------------------------
@pytest.mark.parametrize("name", ["resnet_basic", "vit_sdpa", "nano_gpt", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_types(name: str, dtype: torch.dtype) -> None:
    """The scores are those of the rounded weights."""
    model, args, kwargs = made(name)
    assert not kwargs
    args = tuple(x.to(dtype) if x.is_floating_point() else x for x in args)
    result = lap_ext.scores(model.to(dtype), args)
    rounded = {key: x.float() for key, x in model.state_dict().items()}
    model.float().load_state_dict(rounded)
    expected = lap_ext.scores(model, tuple(x.float() if x.is_floating_point() else x for x in args))
    for layer, score in result.items():
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(score.float(), expected[layer], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["resnet_basic", "convnext", "autoencoder"])
def test_channels_last(name: str) -> None:
    model, args, _ = made(name)
    model = model.to(memory_format=torch.channels_last)
    images = args[0].contiguous(memory_format=torch.channels_last)
    result = lap_ext.scores(model, images)
    for layer, expected in scored(name).items():
        torch.testing.assert_close(result[layer], expected, rtol=1e-6, atol=0)


def test_meta_parameters() -> None:
    """A model too large to build: its topology needs no values; a scale without one is NaN."""
    with torch.device("meta"):
        model = Small()
    topology = lap_ext.trace(model, torch.empty(2, 3, 4, 4, device="meta"))
    real = lap_ext.trace(Small(), IMAGES.float())
    assert str(topology) == str(real) and topology.to_dot() == real.to_dot()
    (edge, *_) = topology.layers["depth"].prev
    assert edge.name == "stem" and edge.scale is not None and edge.scale.isnan().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_gradients(mode: Any) -> None:
    model, args, _ = made("resnet_basic")
    with mode():
        result = lap_ext.scores(model, args)
    torch.testing.assert_close(result, scored("resnet_basic"), rtol=0, atol=0)
    assert not any(score.requires_grad for score in result.values())


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = randomized(Small()).requires_grad_(False)
    assert len(lap_ext.scores(model, IMAGES)) == 5
    with pytest.raises(ValueError, match="its parameter was made in inference mode"):
        lap_ext.prune(model, IMAGES, 0.5)


# ---- what is left alone -------------------------------------------------------------------------
def values(model: nn.Module) -> dict[str, Tensor]:
    kept = {key: x.clone() for key, x in model.state_dict().items()}
    return kept | {"random state": torch.get_rng_state()}


def surroundings(model: nn.Module) -> dict[str, Any]:
    return {
        "identity": {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "versions": {name: p._version for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "fast": torch.backends.mha.get_fastpath_enabled(),
        "gradient_mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("name", ["vgg_bn", "vit_mha", "lstm_bidirectional", "hf_llama_sdpa"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_model_is_left_as_it_was(name: str, training: bool) -> None:
    """Values to the bit, modes, gradients, hooks, random state: after trace, scores, a dry run."""
    model, args, kwargs = made(name)
    model.train(training)
    list(model.children())[-1].train(not training)  # part of it in the other mode
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    seen: list[str] = []
    handle = next(model.children()).register_forward_hook(lambda *_: seen.append("called"))
    expected = scored(name)
    torch.backends.mha.set_fastpath_enabled(True)
    before, around = values(model), surroundings(model)
    result = lap_ext.scores(model, args or kwargs)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)  # dropout and statistics of eval
    lap_ext.prune(model, args or kwargs, 0.5, apply=False)
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    assert surroundings(model) == around
    handle.remove()


class Cached(nn.Linear):
    """As transformers' language models: what is kept for the next token is no tensor."""

    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        y = super().forward(x)
        return (y, object()) if use_cache else y


def test_no_cache_is_asked_for() -> None:
    model = Cached(4, 3)
    assert list(lap_ext.trace(model, torch.randn(1, 4)).layers) == ["weight"]
    topology = lap_ext.trace(model, {"x": torch.randn(1, 4), "use_cache": True})
    assert list(topology.layers) == ["weight"]  # what is no tensor is left out


def test_pruning_changes_the_pruned_weights_alone() -> None:
    model, args, _ = made("resnet_basic")
    model.train()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    result = lap_ext.prune(model, args, 0.7)
    assert model.training
    for key, x in model.state_dict().items():
        mask = result.masks.get(key.removesuffix(".weight"))
        assert torch.equal(x, before[key] if mask is None else before[key] * mask), key


def test_the_same_bits_every_time() -> None:
    first = scored("shufflenet_v2")
    model, args, _ = made("shufflenet_v2")
    torch.manual_seed(1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.testing.assert_close(lap_ext.scores(model, args), first, rtol=0, atol=0)


def test_every_zoo_entry_is_made_alike() -> None:
    """Traces are shared between tests: two models of one entry must be equal."""
    for entry in zoo.VISION[::9]:
        one, other = entry.make()[0].state_dict(), entry.make()[0].state_dict()
        torch.testing.assert_close(one, other, rtol=0, atol=0)
