# SPDX-License-Identifier: MIT
"""Configs of hostile hands: none runs code, asks, uses the network or goes on for ever."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lap_ext import checkpoint
from lap_ext.checkpoint import config, guard, hf
from lap_ext.checkpoint.files import open_directory
from lap_ext.checkpoint.names import Names
from lap_ext.errors import LapError
from tests.helpers.checkpoints import INPUTS, network, saved, write
from tests.helpers.mutations import bounded

pytest.importorskip("transformers.modeling_utils")  # here, as it takes seconds

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
Edit = Callable[[dict[str, Any]], Any]


def two_parts(root: Path, **decoder: Any) -> Path:
    """A model of two parts, of which transformers looks the second one up by its config."""
    directory = write(root / "dense", {"x.weight": torch.zeros(3, 4)}, shards=1)
    table = {
        "model_type": "encoder-decoder",
        "architectures": ["EncoderDecoderModel"],
        "is_encoder_decoder": True,
        "encoder": {"model_type": "bert", "vocab_size": 13} | SMALL,
        # no language model, so that transformers would look for one among the files
        "decoder": {"model_type": "vit", "_name_or_path": str(directory)} | SMALL | decoder,
    }
    (directory / "config.json").write_text(json.dumps(table))
    (directory / "evil.py").write_text(f"open({str(root / 'ran')!r}, 'w').close()\nclass M: pass\n")
    return directory


def edited(directory: Path, edit: Edit) -> Path:
    path = directory / "config.json"
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Saves a model of the zoo, once; its config is put back by each call."""
    root, texts = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> Path:
        if name not in texts:
            saved(name, root / name)
            texts[name] = (root / name / "config.json").read_text()
        (root / name / "config.json").write_text(texts[name])
        return root / name

    return get


Models = Callable[[str], Path]


def refused(directory: Path) -> str:
    """The one line of the error that building the model ends in, within 10 s and 1 GB."""
    with pytest.raises(LapError) as caught, bounded():
        hf.build(open_directory(directory))
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000
    return text


# --- code ---------------------------------------------------------------------------------------

CODE = {"auto_map": {"AutoModelForCausalLM": "evil.M"}}
ALIAS = {"attribute_map": {"mine": "auto_map"}, "mine": CODE["auto_map"]}


def test_nobody_is_asked_whether_code_may_run(tmp_path: Path) -> None:
    directory = two_parts(tmp_path, **CODE)
    arguments = ["prune", directory, "--sparsity", "0.5", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "lap_ext", *map(str, arguments)],
        input="y\n" * 9,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not (tmp_path / "ran").exists()
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert "got 'decoder.auto_map', which names Python files. Pass " in done.stderr


@pytest.mark.parametrize(
    "decoder",
    [
        CODE,
        ALIAS,
        {"__dict__": CODE},
        {"sub_configs": ["__class__"]},
        {"per_layer_config": [CODE]},
    ],
    ids=["auto_map", "alias", "dict", "sub_configs", "list"],
)
def test_code(decoder: dict[str, Any], tmp_path: Path) -> None:
    directory = two_parts(tmp_path, **decoder)
    assert "a config.json without" in refused(directory)
    assert not (tmp_path / "ran").exists()


def test_the_second_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the check of the config overlooks: a question is refused where it is asked."""
    directory = two_parts(tmp_path, **CODE)
    monkeypatch.setattr(config, "_check_code", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "which must be executed" in refused(directory)  # no answer is no consent
    assert not (tmp_path / "ran").exists() and sys.stdin.read() == "y\n"


def test_other_threads_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "dense", network().state_dict())
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    answers = []
    with guard.guarded(open_directory(directory)):
        with pytest.raises(LapError, match="that needs no answer from standard input"):
            input()
        thread = threading.Thread(target=lambda: answers.append(input()))
        thread.start()
        thread.join()
    assert [*answers, input()] == ["one", "two"]


def test_the_network_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that is only named makes transformers ask the hub for it."""
    from huggingface_hub import constants

    directory = write(tmp_path / "dense", {"x.weight": torch.zeros(3, 4)}, shards=1)
    table = {"model_type": "detr", "architectures": ["DetrForObjectDetection"]}
    table |= {"use_timm_backbone": False, "backbone": "resnet", "backbone_config": None}
    (directory / "config.json").write_text(json.dumps(table))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert "that needs no network" in refused(directory)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"backbone": "hf-hub:evil/net"}, "got 'backbone': 'hf-hub:evil/net', which other"),
        ({"backbone": "/etc/net"}, "got 'backbone': '/etc/net', which other"),
        ({"backbone_kwargs": {"checkpoint_path": "evil.pth"}}, "got 'backbone_kwargs': "),
        ({"part": {"model_type": "timm_wrapper"}}, "got 'part.model_type': 'timm_wrapper'"),
        ({"part": {"quantization_config": {}}}, "got a config with 'part.quantization_config'"),
    ],
)
def test_what_others_would_complete(table: dict[str, Any], said: str, models: Models) -> None:
    assert said in refused(edited(models("hf_gpt2_sdpa"), lambda c: c.update(table)))


@pytest.mark.parametrize(
    "value", ["kernels-community/evil", "evil/kernel:run", "flash_attention_2"]
)
def test_kernels_of_others_are_not_loaded(
    value: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    keys = ("attn_implementation", "_attn_implementation", "experts_implementation")
    directory = edited(models("hf_gpt2_sdpa"), lambda c: c.update(dict.fromkeys(keys, value)))
    assert hf.build(open_directory(directory)).config._attn_implementation == "sdpa"


# --- numbers ------------------------------------------------------------------------------------

ABSURD: dict[str, tuple[str, str, Any, str]] = {
    "layers": ("hf_gpt2_sdpa", "n_layer", 10**12, "'n_layer' <= 128"),
    "listed_layers": ("hf_dinov2", "num_hidden_layers", 10**12, "'num_hidden_layers' <= 128"),
    "shared_layers": ("hf_albert", "num_hidden_layers", 10**12, "'num_hidden_layers' <= 128"),
    "depths": ("hf_swin", "depths", [1, 10**12], "'depths' <= 1,280"),
    "huge_depths": ("hf_swin", "depths", [0.5, 10**400], "'depths' <= 1,280"),
    "labels": ("hf_bert_sdpa", "num_labels", 10**9, "'num_labels' <= 1,000,000"),
    "many_layers": ("hf_segformer", "depths", [600, 600], "more than 3,280 parts"),
    "factor": ("hf_efficientnet", "depth_coefficient", 1e9, "more than 3,480 parts"),
    "heads": ("hf_t5_sdpa", "num_heads", 10**12, "elements"),
    "vocabulary": ("hf_llama_sdpa", "vocab_size", 10**12, "elements"),
    "experts": ("hf_mixtral_batched_mm", "num_local_experts", 10**9, "elements"),
    "positions": ("hf_distilbert", "max_position_embeddings", 10**9, "elements"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_numbers(name: str, models: Models) -> None:
    model, key, value, said = ABSURD[name]
    directory = edited(
        models(model), lambda c: c.update({key: value, "sinusoidal_pos_embds": True})
    )
    assert said in refused(directory)


def test_a_list_that_a_config_multiplies(models: Models) -> None:
    def edit(table: dict[str, Any]) -> None:
        table.clear()
        table |= {"model_type": "gpt_neo", "architectures": ["GPTNeoModel"]}
        table["attention_types"] = [[["global"], 2_000_000_000]]

    assert "'attention_types' <= 1,280" in refused(edited(models("hf_gpt2_sdpa"), edit))


def test_layers_that_are_called_more_often_than_stored(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_MORE_PARTS", -400)  # 500 calls and not 2,000: those take minutes
    directory = edited(models("hf_albert"), lambda c: c.update(num_hidden_layers=20))
    with pytest.raises(LapError, match="one of a model that calls more than"):
        checkpoint.inspect(directory)


def test_a_name_that_transformers_cannot_sort(models: Models, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(models("hf_gpt2_sdpa"), tmp_path / "odd"))
    for path in (*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    save_file({"h.\u00b2": torch.ones(2, 2)}, directory / "model.safetensors")
    with pytest.raises(LapError, match="names of tensors that transformers can map"):
        checkpoint.inspect(directory)


def test_a_build_leaves_nothing_behind(models: Models) -> None:
    from torch.nn.modules import module

    refused(edited(models("hf_gpt2_sdpa"), lambda c: c.update(vocab_size=10**12)))
    assert not module._global_parameter_registration_hooks
    assert not module._global_module_registration_hooks


# --- tables that are no config ------------------------------------------------------------------

PART = '{"model_type": "bert", "architectures": ["BertModel"]'
OTHERS: dict[str, tuple[str | Edit, str]] = {
    "no_json": ("{", "config.json to be JSON"),
    "twice": ('{"model_type": "bert", "model_type": "vit"}', "'model_type' twice"),
    "deep": ('{"a":' * 5000, "config.json to be JSON"),
    "list": ("[]", "config.json with a table, got list"),
    "type": (lambda c: c.update(model_type=["gpt2"]), "config.model_type to name"),
    "no_type": (lambda c: c.pop("model_type"), "config.model_type to name"),
    "text": (lambda c: c.update(architectures="GPT2LMHeadModel"), "config.architectures to name"),
    "numbers": (lambda c: c.update(architectures=[1]), "config.architectures to name"),
    "function": (lambda c: c.update(architectures=["pipeline"]), "config.architectures to name"),
    "dtype": (lambda c: c.update(dtype="load"), "a config.json that transformers"),
    "controls": (lambda c: c.update(model_type="\x1b[2J\u202e"), "a config.json that transformers"),
    "tables": (f'{PART}, "a": [' + "[1]," * 120_000 + "0]}", "100,000 lists and tables at most"),
    "other_file": (
        lambda c: c.update(configuration_files=["config.4.0.0.json"]),
        "a config.json that transformers",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_config(name: str, models: Models) -> None:
    change, said = OTHERS[name]
    directory = models("hf_gpt2_sdpa")
    if isinstance(change, str):
        (directory / "config.json").write_text(change)
    else:
        edited(directory, change)
    assert said in refused(directory)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "large"])
def test_no_regular_file(kind: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "dense", network().state_dict())
    path = directory / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10**10)
    assert "config.json'" in refused(directory)


SIZES: dict[str, tuple[str, dict[str, Any], str]] = {
    "image": ("hf_swin", {"image_size": 10**6}, "config.image_size to be a whole number from 1 to"),
    "image_text": ("hf_resnet_basic", {"image_size": "12"}, "config.image_size to be a whole"),
    "image_sides": ("hf_resnet_basic", {"image_size": [8, -8]}, "config.image_size to be a whole"),
    "positions": ("hf_bloom", {"max_position_embeddings": -1}, "config.max_position_embeddings to"),
    "positions_text": ("hf_bloom", {"max_position_embeddings": "8"}, "to be a whole number from 1"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_inputs(name: str, models: Models) -> None:
    model, sizes, said = SIZES[name]
    directory = edited(models(model), lambda c: c.update(sizes))
    with pytest.raises(LapError) as caught, bounded():
        checkpoint.inspect(directory)
    assert said in str(caught.value)


# --- tensors that the model does not know --------------------------------------------------------


def test_unknown_matrices_are_named(tmp_path: Path) -> None:
    unknown = {f"extra.{i}.weight": torch.ones(3, 2) for i in range(5)}
    others = {"steps": torch.ones(2, 2, dtype=torch.int64), "bias": torch.ones(3)}
    source = write(tmp_path / "dense", network().state_dict() | unknown | others)
    options: dict[str, Any] = {"model": network(), "example_inputs": INPUTS}
    said = (
        r"no parameter for 5 stored tensors, which stay as they are, unpruned: "
        r"'extra.0.weight', 'extra.1.weight', 'extra.2.weight' and 2 more\. If they are"
    )
    for call in (
        lambda: checkpoint.prune(source, tmp_path / "out", 0.5, **options),
        lambda: checkpoint.scores(source, **options),
        lambda: checkpoint.inspect(source, **options),
    ):
        with pytest.warns(UserWarning, match=said) as caught:
            call()
        assert len(caught) == 1


def test_what_transformers_ignores_is_not_named(tmp_path: Path) -> None:
    """Old files of GPT-2 hold the causal mask; a matrix of another class is another matter."""
    directory = tmp_path / "dense"
    saved("hf_gpt2_sdpa", directory, size="1GB")
    state = load_file(directory / "model.safetensors")
    more = {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9), "head.weight": torch.ones(3, 2)}
    save_file(state | more, directory / "model.safetensors", {"format": "pt"})
    files = open_directory(directory)
    with pytest.warns(UserWarning, match="no parameter for 1 stored tensors, .* 'head.weight'"):
        Names(files, hf.build(files)).warn_of_unknown()
