# SPDX-License-Identifier: MIT
"""LookaheadModifier in llm-compressor's oneshot, on checkpoint directories of tiny random models.

The oracle is `lap_ext.prune` of the same model. llm-compressor wants a transformers of its own (see
CONTRIBUTING.md), so most of these tests are skipped where it is not installed.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lap_ext

transformers = pytest.importorskip("transformers", reason="the models of this adapter's framework")

needs_framework = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llmcompressor is not installed"
)
# transformers' own, about the modules that llm-compressor has moved to the CPU, where they are
saves = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}
SIZES |= {"intermediate_size": 12, "vocab_size": 13, "max_position_embeddings": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def modifier(**given: Any) -> Any:
    return importlib.import_module("lap_ext.adapters.llmcompressor").LookaheadModifier(**given)


def oneshot(model: Any, recipe: Any, **given: Any) -> Any:
    return importlib.import_module("llmcompressor").oneshot(str(model), recipe=recipe, **given)


def oneshot_of(model: Any, recipe: Any) -> Any:
    """The same for a model in memory; llm-compressor reads its config from the directory."""
    return importlib.import_module("llmcompressor").oneshot(model, recipe=recipe)


def directory_of(path: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(num_key_value_heads=2, **SIZES, **IDS, **config)
    transformers.LlamaForCausalLM(sizes).save_pretrained(path)
    return path


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def pruned(model: Any, sparsity: Any, **options: Any) -> lap_ext.Masks:
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False}
    return lap_ext.prune(model, inputs, sparsity, **options).masks


def check_equal(state: dict[str, Tensor], model: Any) -> None:
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


LINEAR = ["*embed*", "lm_head"]  # what else there is


@needs_framework
@saves
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "global", "normalize": "lamp", "criterion": "magnitude"},
        {"order": "forward", "rounds": 2},
        {"residual": "chain", "batch_norm": "ignore"},
    ],
    ids=["layer", "global", "forward", "residual"],
)
def test_what_prune_prunes(tmp_path: Path, options: dict[str, Any]) -> None:
    """Exactly as many, written, and again from the recipe that was written."""
    directory = directory_of(tmp_path / "dense")
    model = load(directory)
    masks = pruned(model, 0.6, exclude=LINEAR, **options)
    example = torch.tensor([[3, 4]])  # stays out of the recipe
    mine = modifier(sparsity=0.6, ignore="lm_head", example_inputs=example, **options)
    assert mine.result is None and mine.masks == lap_ext.Masks({})
    result = oneshot(directory, mine, output_dir=str(tmp_path / "out"))
    assert mine.masks == masks and mine.result.masks == masks
    check_equal(result.state_dict(), model)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], x) for name, x in model.state_dict().items())
    again = oneshot(directory, str(tmp_path / "out" / "recipe.yaml"))
    check_equal(again.state_dict(), model)


@needs_framework
def test_targets(tmp_path: Path) -> None:
    """llm-compressor's patterns; what is no target still counts as a neighbor."""
    directory = directory_of(tmp_path, tie_word_embeddings=True)
    mlp = [f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")]
    for targets, ignore, names in (
        (["re:.*mlp.*"], [], mlp),
        ("Linear", ["re:.*self_attn.*", "lm_head"], mlp),
        (["re:.*layers.1.mlp", mlp[0]], "re:.*down_proj", [mlp[0], *mlp[3:5]]),
        (["lm_head"], [], ["model.embed_tokens"]),  # tied: it is this layer
    ):
        mine = modifier(sparsity=0.5, targets=targets, ignore=ignore)
        model = load(directory)
        others = [name for name in lap_ext_layers(model) if name not in names]
        oneshot(directory, mine)
        assert mine.masks == pruned(model, 0.5, exclude=others)
        assert list(mine.masks) == names
    mine = modifier(sparsity={"*up_proj": 0.5})
    oneshot(directory, mine)
    half = [name for name, (kept, total) in mine.masks.counts().items() if kept < total]
    assert half == [mlp[1], mlp[4]]


def lap_ext_layers(model: Any) -> list[str]:
    inputs = {"input_ids": torch.tensor([[3, 4]]), "use_cache": False}
    return list(lap_ext.trace(model, inputs).layers)


@needs_framework
def test_offloaded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that a dispatch has moved are pruned where they lie, and the dispatch stays."""
    # copies that are handed out would hold nothing
    device = "llmcompressor.pipelines.data_free.pipeline.get_main_device"
    monkeypatch.setattr(device, lambda: torch.device("meta"))
    from compressed_tensors.offload import offload_module
    from compressed_tensors.offload.cache import OffloadCache

    directory = directory_of(tmp_path)
    model, expected = load(directory), load(directory)
    masks = pruned(expected, 0.6, exclude=LINEAR)
    for module in model.modules():
        offload_module(module, "meta", "cpu")
    layer = model.model.layers[0].mlp.up_proj
    offloaded = layer._parameters.offloaded_values["weight"]
    mine = modifier(sparsity=0.6, ignore="lm_head")
    oneshot_of(model, mine)
    assert mine.masks == masks
    assert isinstance(layer._parameters, OffloadCache)
    assert layer._parameters.offloaded_values["weight"] is offloaded
    assert torch.equal(offloaded, expected.model.layers[0].mlp.up_proj.weight)


@needs_framework
def test_quantized_afterwards(tmp_path: Path) -> None:
    """In its turn: the quantization sees the pruned weights, and zero stays zero."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    directory = directory_of(tmp_path)
    model = load(directory)
    masks = pruned(model, 0.6, exclude=LINEAR)
    quantize = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    mine = modifier(sparsity=0.6, ignore="lm_head")
    result = oneshot(directory, [mine, quantize])
    assert mine.masks == masks
    for name, mask in masks.items():
        layer = result.get_submodule(name)
        assert not layer.weight[~mask].any(), name
        highest = model.get_submodule(name).weight.abs().amax(1, keepdim=True)
        assert torch.allclose(layer.weight_scale, highest * 2 / 255, 1e-3, 1e-6), name


@needs_framework
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_tensors.offload import offload_module
    from pydantic import ValidationError

    directory = directory_of(tmp_path)
    wrong: dict[str, Any]
    for wrong in ({"sparsity": 1.5}, {"sparsity": {"*": -1}}, {"sparsity": 0.5, "sparsty": 1}, {}):
        with pytest.raises(ValidationError):
            modifier(**wrong)
    with pytest.raises(ValidationError, match="should be 'layer' or 'global'"):
        modifier(sparsity=0.5, scope="all")
    for given, text in (
        ({"targets": "Conv2d"}, r"expected targets that name layers of the model .model.embed_tok"),
        ({"rounds": 0}, "expected rounds >= 1, got 0"),
        ({"criterion": "wisdom"}, "criterion"),
    ):
        second = modifier(sparsity=0.5, **given)
        first = modifier(sparsity=0.5)
        with pytest.raises(ValueError, match=text):
            oneshot(directory, [first, second])
        assert first.result is None  # all are checked before the first one begins
    plain = SimpleNamespace(model=torch.nn.Linear(2, 2))
    with pytest.raises(
        TypeError, match=r"LookaheadModifier: .* and Linear has no dummy_inputs. Pa"
    ):
        modifier(sparsity=0.5).on_initialize(plain)
    model = load(directory)
    offload_module(model.lm_head, "cpu", "disk", offload_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"got 'lm_head.weight' on disk or the meta device. Load"):
        oneshot_of(model, modifier(sparsity=0.5))
    monkeypatch.setattr("lap_ext.adapters.llmcompressor.is_distributed", lambda: True)
    with pytest.raises(ValueError, match=r"expected one process .* got several. Run oneshot witho"):
        oneshot(directory, modifier(sparsity=0.5))


@needs_framework
def test_examples() -> None:
    """Those of the module, which pytest does not collect where llm-compressor is missing."""
    module = importlib.import_module("lap_ext.adapters.llmcompressor")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, tried = doctest.testmod(module, optionflags=flags)
    assert not failed and tried > 10
