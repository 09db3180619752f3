# SPDX-License-Identifier: MIT
"""checkpoint.prune gives the result of prune, bit for bit, whatever fits into memory."""

from __future__ import annotations

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import shards
from tests.helpers.checkpoints import (
    INPUTS,
    bits,
    check_same,
    least_memory,
    network,
    prune,
    saved,
    write,
)
from tests.helpers.parameters import each_dtype

OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "global": {"scope": "global"},
    "norm": {"scope": "global", "normalize": "norm"},
    "lamp": {"scope": "global", "normalize": "lamp"},
    "lamp_magnitude": {"criterion": "magnitude", "scope": "global", "normalize": "lamp"},
    "lamp_random": {"criterion": "random", "scope": "global", "normalize": "lamp"},
    "lamp_dict": {"sparsity": {"3": 0.9, "5": 0.1}, "scope": "global", "normalize": "lamp"},
    "lamp_few": {"sparsity": 0.9998, "min_keep": 0, "scope": "global", "normalize": "lamp"},
    "lamp_none": {"sparsity": 1.0, "min_keep": 0, "scope": "global", "normalize": "lamp"},
    "lamp_layer": {"normalize": "lamp"},
    "magnitude": {"criterion": "magnitude"},
    "magnitude_global": {"criterion": "magnitude", "scope": "global"},
    "lookback": {"criterion": "lookback"},
    "lookforward": {"criterion": "lookforward", "scope": "global"},
    "random": {"criterion": lap_ext.criteria.Random(3)},
    "random_global": {"criterion": "random", "scope": "global"},
    "magnitude_bn": {"criterion": "magnitude_bn", "scope": "global"},
    "dict": {"sparsity": {"3": 0.9, "5": 0.1}},
    "dict_global": {"sparsity": {"3": 0.9, "5": 0.1}, "scope": "global"},
    "erk": {"sparsity": lap_ext.erk(0.8)},
    "exclude": {"exclude": ["0"], "scope": "global"},
    "none": {"sparsity": 1.0, "min_keep": 0},
    "all": {"sparsity": 0.0, "scope": "global"},
}


@pytest.mark.parametrize("memory", ["4GB", "least"])
@pytest.mark.parametrize("name", OPTIONS)
def test_plain_model(name: str, memory: str, tmp_path: Path) -> None:
    options = {"sparsity": 0.6} | OPTIONS[name]
    net, out = network(), tmp_path / "out"
    source = write(tmp_path / "dense", net.state_dict())
    if memory == "least":
        memory = str(least_memory(lambda few: prune(source, out, memory=few, **options)))
    got = prune(source, out, memory=memory, **options)
    want = lap_ext.prune(net, INPUTS, **options)
    assert got.masks == want.masks
    assert list(got.layers) == list(want.layers)
    assert str(got) == str(want)
    assert got.to_json() == want.to_json()
    for shard in source.glob("*.safetensors"):
        for key, tensor in load_file(out / shard.name).items():
            assert torch.equal(bits(tensor), bits(net.state_dict()[key])), key


@each_dtype
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_dtypes(dtype: torch.dtype, scope: str, tmp_path: Path) -> None:
    net = network(dtype)
    source = write(tmp_path / "dense", net.state_dict(), shards=1)
    few = least_memory(lambda few: prune(source, tmp_path / "out", scope=scope, memory=few))
    want = lap_ext.prune(net, INPUTS.to(dtype), 0.6, scope=scope)
    for memory in (few, "1GB"):
        got = prune(source, tmp_path / str(memory), scope=scope, memory=memory)
        assert got.masks == want.masks
        pruned = load_file(tmp_path / str(memory) / "model.safetensors")
        for key, tensor in net.state_dict().items():
            assert torch.equal(bits(pruned[key]), bits(tensor))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["lookahead", "magnitude"])
def test_ties(criterion: str, scope: str, tmp_path: Path) -> None:
    """Three values of weights: nearly all scores have many equals, and the first ones are kept."""
    net = network(torch.float16)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(0, 3, parameter.shape))
    source, inputs = write(tmp_path / "dense", net.state_dict()), INPUTS.half()
    options = {"scope": scope, "criterion": criterion}
    mine = options | {"model": net, "example_inputs": inputs}
    few = least_memory(lambda few: prune(source, tmp_path / "out", memory=few, **mine))
    for sparsity in (0.2, 0.5, 0.9):
        for memory in (few, 2 * few, "1GB"):
            out = tmp_path / f"{sparsity} {memory}"
            got = prune(source, out, sparsity, memory=memory, **mine)
            want = lap_ext.prune(net, inputs, sparsity, apply=False, **options)
            assert got.masks == want.masks


@pytest.mark.parametrize("memory", ["4GB", "least"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_slow_disk(
    scope: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written in the background is not overwritten by what is read ahead."""
    sizes, extra = (6, 150, 70, 60, 9), {"1.copied": torch.rand(100)}
    net = nn.Sequential(*[nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)])
    real = shards.Writer._finish
    source = write(tmp_path / "dense", net.state_dict() | extra, shards=1)
    options = {"scope": scope, "model": net}
    if memory == "least":
        few = least_memory(lambda few: prune(source, tmp_path / "out", memory=few, **options))
        memory = str(few)

    def late(self: Any, *given: Any) -> None:
        time.sleep(0.003)
        real(self, *given)

    monkeypatch.setattr(shards.Writer, "_finish", late)
    prune(source, tmp_path / "out", memory=memory, **options)
    lap_ext.prune(net, INPUTS, 0.6, scope=scope)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, extra[name] if name in extra else net.state_dict()[name]), name


NAMES = ["hf_llama_sdpa", "hf_qwen2", "hf_gpt2_sdpa", "hf_bert_mlm", "hf_gemma", "hf_t5_gated"]


@pytest.mark.parametrize("name", NAMES)
def test_transformers(name: str, tmp_path: Path) -> None:
    """Llama, tied Qwen, GPT-2 ([I, O] weights), BERT, Gemma (a scale that is in no file), T5."""
    model, inputs = saved(name, tmp_path / "dense")
    source, dense = tmp_path / "dense", copy.deepcopy(model.state_dict())
    assert len(list(source.glob("*.safetensors"))) > 1
    topology = lap_ext.trace(model, inputs)
    for scope in ("layer", "global"):
        out, how = tmp_path / scope, {"scope": scope}
        few = least_memory(lambda few, out=out, how=how: checkpoint.prune(
            source, out, 0.7, memory=few, **how))  # fmt: skip
        got = checkpoint.prune(source, out, 0.7, memory=few, **how)
        model.load_state_dict(dense)
        want = lap_ext.prune(model, None, 0.7, topology=topology, **how)
        check_same(out, got, model, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = saved("hf_qwen2", tmp_path / "dense", dtype)
    got = checkpoint.prune(tmp_path / "dense", tmp_path / "out", 0.7)
    check_same(tmp_path / "out", got, model, lap_ext.prune(model, inputs, 0.7))


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    """transformers joins the gate and up projections of all experts into one parameter."""
    model, inputs = saved("hf_qwen3_moe", tmp_path / "dense")
    source, dense = tmp_path / "dense", copy.deepcopy(model.state_dict())
    names = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.experts.2.gate_proj.weight" in names
    model.set_experts_implementation("batched_mm")  # as the zoo has it: eager does not export
    topology = lap_ext.trace(model, inputs)
    for scope in ("layer", "global"):
        got = checkpoint.prune(source, tmp_path / scope, 0.7, scope=scope)
        assert "model.layers.0.mlp.experts.gate_up_proj" in got.masks
        model.load_state_dict(dense)
        want = lap_ext.prune(model, None, 0.7, scope=scope, topology=topology)
        check_same(tmp_path / scope, got, model, want)


@pytest.mark.parametrize("memory", ["4GB", "least"])
def test_batch_norms_are_read_from_the_files(memory: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    source = write(tmp_path / "dense", net.state_dict())
    with torch.device("meta"):
        twin = nn.Sequential(*[type(x)(**arguments(x)) for x in net])
    options = {"model": twin, "example_inputs": torch.zeros(1, 3, 6, 6), "batch_norm": "fold"}
    if memory == "least":
        memory = str(
            least_memory(lambda few: prune(source, tmp_path / "out", memory=few, **options))
        )
    got = prune(source, tmp_path / "out", memory=memory, **options)
    want = lap_ext.prune(net.eval(), torch.zeros(1, 3, 6, 6), 0.6, batch_norm="fold")
    assert got.masks == want.masks


def arguments(layer: nn.Module) -> dict[str, Any]:
    """What builds a layer like this one."""
    names = "in_channels out_channels kernel_size groups num_features in_features out_features"
    return {name: getattr(layer, name) for name in names.split() if hasattr(layer, name)}


def test_every_file_is_there_and_the_rest_is_as_it_was(dense: Path, tmp_path: Path) -> None:
    (dense / "sub").mkdir()
    (dense / "sub" / "notes.txt").write_text("kept")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in dense.rglob("*") if p.is_file()}
    prune(dense, tmp_path / "out")
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}
    names = {str(p.relative_to(dense)) for p in before} | {"lap_ext_masks.safetensors"}
    out = tmp_path / "out"
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]
    for path, (old, _) in before.items():
        new = (out / path.relative_to(dense)).read_bytes()
        if path.suffix == ".safetensors":
            head = 8 + int.from_bytes(old[:8], "little")
            assert new[:head] == old[:head]
            assert len(new) == len(old)
        else:
            assert new == old


def test_weights_in_other_formats_come_along_with_a_warning(dense: Path, tmp_path: Path) -> None:
    (dense / "pytorch_model.bin").write_bytes(bytes(2_000_000))
    (dense / "training_args.bin").write_bytes(bytes(2_000))
    with pytest.warns(UserWarning, match=r"^These files may hold .* unpruned: pytorch_model.bin"):
        prune(dense, tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_model.bin").stat().st_size == 2_000_000


def test_tensors_of_other_dtypes_are_copied(tmp_path: Path) -> None:
    extra = {"steps": torch.arange(5), "scale": torch.ones(3, dtype=torch.float8_e4m3fn),
             "empty": torch.zeros(0, 4), "one": torch.tensor(True)}  # fmt: skip
    source = write(tmp_path / "dense", network().state_dict() | extra, shards=3)
    prune(source, tmp_path / "out")
    for shard in (tmp_path / "out").glob("model*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name in extra:
                assert torch.equal(tensor.view(torch.uint8), extra[name].view(torch.uint8))


def test_masks_file(dense: Path, tmp_path: Path) -> None:
    got = prune(dense, tmp_path / "out")
    assert got.directory == tmp_path / "out"
    assert got.masks_file == tmp_path / "out" / "lap_ext_masks.safetensors"
    loaded = lap_ext.Masks.load(got.masks_file)
    assert loaded == got.masks
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == got.masks_file.read_bytes()
    with pytest.raises(KeyError, match="nothing"):
        got.masks["nothing"]
    without = prune(dense, tmp_path / "without", save_masks=False)
    assert without.masks_file is None
    assert not list((tmp_path / "without").glob("lap_ext*"))
    assert list(without.layers) == list(got.layers)


def test_layers_and_exclude(dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": ["3", "5"], "exclude": "5"}
    got = prune(dense, tmp_path / "out", **options)
    assert got.masks == lap_ext.prune(network(), INPUTS, 0.6, **options).masks
    assert list(got.masks) == ["3"] and got._repr_html_().startswith("<table>")


def test_a_pruned_checkpoint_can_be_pruned_again(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "once", 0.3)
    again = prune(tmp_path / "once", tmp_path / "twice", 0.6)
    assert again.masks_file is not None
    assert lap_ext.Masks.load(again.masks_file) == again.masks
    assert again.sparsity == pytest.approx(0.6, abs=0.01)


def test_a_tied_weight_that_is_stored_twice(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    state = {"0.weight": net[0].weight.detach(), "2.weight": net[0].weight.detach().clone()}
    source = write(tmp_path / "dense", state)
    got = prune(source, tmp_path / "out", model=net)
    want = lap_ext.prune(net, INPUTS, 0.6)
    assert got.masks == want.masks
    for shard in (tmp_path / "out").glob("model*.safetensors"):
        (tensor,) = load_file(shard).values()
        assert torch.equal(tensor, net[0].weight)


def test_the_prefix_of_a_base_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, inputs = saved("hf_gpt2_sdpa", tmp_path / "full")
    model.transformer.save_pretrained(tmp_path / "dense")  # "h.0..." for "transformer.h.0..."
    config = tmp_path / "dense" / "config.json"
    config.write_text(config.read_text().replace("GPT2Model", "GPT2LMHeadModel"))
    got = checkpoint.prune(tmp_path / "dense", tmp_path / "out", 0.7)
    assert got.masks == lap_ext.prune(model, inputs, 0.7).masks


def test_progress_adds_up(dense: Path, tmp_path: Path) -> None:
    seen: list[checkpoint.Progress] = []
    prune(dense, tmp_path / "out", scope="global", on_progress=seen.append)
    assert list(dict.fromkeys(x.step for x in seen)) == ["measure", "rank", "write"]
    for step in ("measure", "write"):  # one pass each; a ranking may need several
        done = [(x.done, x.total) for x in seen if x.step == step]
        assert done == sorted(done) and done[-1][0] == done[-1][1] > 0
    assert max(x.done for x in seen if x.step == "rank") == max(
        x.total for x in seen if x.step == "rank"
    )


def test_the_model_is_left_alone(dense: Path, tmp_path: Path) -> None:
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    got = prune(dense, tmp_path / "out", model=net)
    assert net.training
    assert not any(parameter.any() for parameter in net.parameters())
    assert got.masks == lap_ext.prune(network(), INPUTS, 0.6).masks
