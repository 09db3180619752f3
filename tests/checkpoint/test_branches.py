# SPDX-License-Identifier: MIT
"""Directories of models with several branches: inputs for all of them follow from the config."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lap_ext
from lap_ext.checkpoint.files import open_directory
from lap_ext.checkpoint.structure import structure_of

transformers: Any = pytest.importorskip("transformers", minversion="5.20")

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = {**SMALL, "vocab_size": 32, "max_position_embeddings": 16, "num_key_value_heads": 2}
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}


def clip() -> Any:
    text = {**TEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=4)
    return transformers.CLIPModel(config)


def blip() -> Any:
    text = {**TEXT, "encoder_hidden_size": 8, "bos_token_id": 1, "sep_token_id": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=IMAGE)
    return transformers.BlipForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config={**IMAGE, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=31,
    )
    return transformers.LlavaForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        vision_config=IMAGE,
        text_config={**TEXT, "model_type": "llama", "pad_token_id": 0},
        image_token_id=31,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [clip, blip, llava], ids=lambda build: build.__name__)
def test_the_inputs_reach_every_branch(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topology = structure_of(open_directory(tmp_path), None, None, "raise").topology
    assert topology.unreached == ()
    images = [name for name in topology.layers if "vision" in name]
    assert len(images) >= 5 and len(topology.layers) >= len(images) + 8
    assert all(torch.Size(layer.shape) for layer in topology.layers.values())


def test_a_branch_that_cannot_be_traced_is_said_and_left_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(model: Any, inputs: Any, **options: Any) -> lap_ext.Topology:
        if "pixel_values" in inputs:
            raise lap_ext.TopologyError("sizes that are known", "others")
        return lap_ext.trace(model, inputs, **options)

    idefics3().save_pretrained(tmp_path)
    monkeypatch.setattr("lap_ext.checkpoint.structure.trace", traced)
    text = "^The image branch is not pruned: its trace expected sizes that are known, got others"
    with pytest.warns(UserWarning, match=text):
        topology = structure_of(open_directory(tmp_path), None, None, "raise").topology
    assert topology.unreached and all(name.startswith("model.") for name in topology.unreached)
    assert "model.vision_model.encoder.layers.0.self_attn.k_proj.weight" in topology.unreached
    assert any("text_model" in name for name in topology.layers)
