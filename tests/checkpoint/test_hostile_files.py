# SPDX-License-Identifier: MIT
"""Checkpoints that are damaged, foreign or hostile: one error each, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint.files import MASKS
from tests.helpers.checkpoints import network, prune, saved, write

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def truncated(directory: Path) -> None:
    data = (directory / SECOND).read_bytes()
    (directory / SECOND).write_bytes(data[:-1])


def longer(directory: Path) -> None:
    with (directory / SECOND).open("ab") as file:
        file.write(b"x")


def huge_header(directory: Path) -> None:
    data = (directory / SECOND).read_bytes()
    (directory / SECOND).write_bytes((1 << 62).to_bytes(8, "little") + data[8:])


def pickled(directory: Path) -> None:
    torch.save(network().state_dict(), directory / SECOND)


def header(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        data = (directory / SECOND).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = change(data[8:end].decode())
        text = text if isinstance(text, bytes) else text.encode()
        (directory / SECOND).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return apply


def table(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        text = change(index)
        (directory / INDEX).write_text(text if isinstance(text, str) else json.dumps(index))

    return apply


def twice(text: str) -> str:
    """The same name two times, at two places."""
    entries = json.loads(text)
    name = next(x for x in entries if x != "__metadata__")
    return text.rstrip()[:-1] + f', "{name}": {json.dumps(entries[name])}}}'


def a_list(text: str) -> str:
    """What serde, which safetensors is written with, takes for a table as well."""
    entries = json.loads(text)
    name = next(x for x in entries if x != "__metadata__")
    facts = entries[name]
    entries[name] = [facts["dtype"], facts["shape"], facts["data_offsets"]]
    return json.dumps(entries)


def in_file(name: str) -> Callable[[Path], None]:
    """The second shard under another name."""

    def apply(directory: Path) -> None:
        shutil.move(directory / SECOND, directory / name)
        text = (directory / INDEX).read_text()
        (directory / INDEX).write_text(text.replace(SECOND, name))

    return apply


def deep(directory: Path) -> None:
    (directory / "/".join(["d"] * 80)).mkdir(parents=True)


def swap(directory: Path) -> None:
    shutil.move(directory / SECOND, directory / "x")
    shutil.move(directory / FIRST, directory / SECOND)
    shutil.move(directory / "x", directory / FIRST)


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        state = {
            n.replace(old, new): x
            for f in (FIRST, SECOND)
            for n, x in load_file(directory / f).items()
        }
        (directory / INDEX).unlink()
        for file in (FIRST, SECOND):
            (directory / file).unlink()
        save_file(state, directory / "model.safetensors")

    return apply


def reshaped(directory: Path) -> None:
    state = load_file(directory / SECOND)
    name = next(n for n, x in state.items() if x.dim() == 2)
    save_file(state | {name: state[name].t().contiguous()}, directory / SECOND)


def other_dtype(directory: Path) -> None:
    state = load_file(directory / SECOND)
    save_file({n: x.to(torch.float8_e5m2) for n, x in state.items()}, directory / SECOND)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_directory": (shutil.rmtree, "expected a checkpoint directory"),
    "no_shard": (lambda f: (f / SECOND).unlink(), f"expected all files that '{INDEX}' names"),
    "no_index": (lambda f: (f / INDEX).unlink(), "expected model.safetensors or"),
    "shard_is_directory": (
        lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()),
        "expected a file 'model-00002",
    ),
    "shard_is_pipe": (
        lambda f: ((f / SECOND).unlink(), os.mkfifo(f / SECOND)),
        "expected a file 'model-00002",
    ),
    "truncated": (truncated, "expected a complete safetensors file 'model-00002"),
    "longer": (longer, "expected a complete safetensors file 'model-00002"),
    "empty": (lambda f: (f / SECOND).write_bytes(b""), "expected a complete safetensors file"),
    "huge_header": (huge_header, "expected a complete safetensors file"),
    "pickle": (pickled, "expected a complete safetensors file"),
    "no_json": (header(lambda x: x.replace("{", "[")), "expected a complete safetensors file"),
    "not_utf8": (header(lambda x: b"\xff" + x.encode()), "expected a complete safetensors file"),
    "offsets": (header(lambda x: x.replace('"data_offsets":[0', '"data_offsets":[4')), "complete"),
    "shape": (header(lambda x: x.replace('"shape":[', '"shape":[2,')), "complete safetensors file"),
    "twice": (header(twice), "(each tensor once|to have a JSON header|complete)"),
    "a_list": (header(a_list), "(each tensor once|complete)"),
    "long_name": (renamed("3.weight", "3.weight" * 200), "names of at most 1,000 characters"),
    "deep": (deep, "at most 64 levels"),
    "shard_is_record": (in_file("lap_ext.json"), r"weights in \.safetensors files other than"),
    "shard_is_masks": (in_file(MASKS), r"weights in \.safetensors files other than"),
    "shard_is_config": (in_file("config.json"), r"weights in \.safetensors files other than"),
    "index_no_json": (table(lambda x: "{"), f"expected '{INDEX}' to be JSON"),
    "index_deep": (table(lambda x: "[" * 100_000), f"expected '{INDEX}' to be JSON"),
    "index_list": (table(lambda x: "[]"), "with a weight_map"),
    "index_no_map": (table(lambda x: x.pop("weight_map")), "with a weight_map"),
    "index_map": (table(lambda x: x.update(weight_map={"a": 1})), "with a weight_map"),
    "index_path": (
        table(lambda x: x["weight_map"].update({"0.weight": "../secret.safetensors"})),
        "expected files beside",
    ),
    "index_absolute": (
        table(lambda x: x["weight_map"].update({"0.weight": "/etc/passwd"})),
        "expected files beside",
    ),
    "index_long": (
        table(lambda x: x["weight_map"].update(more=f"{'ä' * 200}.safetensors")),
        f"expected files beside '{INDEX}', got 'ä",
    ),
    "index_more": (table(lambda x: x["weight_map"].update(more=FIRST)), "expected 'more' in"),
    "index_less": (table(lambda x: x["weight_map"].__delitem__("5.bias")), "expected '5.bias' of"),
    "index_swapped": (swap, "as 'model.safetensors.index.json' says, got it in"),
    "name": (renamed("3.weight", "3.wait"), "'3.weight' in .* got none, and '3.wait' that the"),
    "scale": (renamed("1.weight", "1.gain"), "'1.weight' in .* got none, and '1.gain'"),
    "wrong_shape": (reshaped, r"with the shape of '.\.weight' in the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, dense: Path, tmp_path: Path) -> None:
    spoil, text = HOSTILE[name]
    spoil(dense)
    with pytest.raises(ValueError, match=text) as caught:
        prune(dense, tmp_path / "out")
    assert str(caught.value).startswith("checkpoint.prune: expected ")
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"dense"}


def test_dtypes_that_have_no_scores(dense: Path, tmp_path: Path) -> None:
    other_dtype(dense)
    with pytest.raises(
        TypeError, match=r"as F64, F32, F16 or BF16 .* got F8_E5M2. Dequantize first"
    ):
        prune(dense, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize("criterion", ["lookahead", "magnitude"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    bad: float, scope: str, criterion: str, tmp_path: Path
) -> None:
    net = network()
    net[3].weight.data[7, 5] = bad
    source = write(tmp_path / "dense", net.state_dict())
    with pytest.raises(
        ValueError,
        match=r"finite weights in layer .3., got 1 non-finite values, the first at flat index 1055",
    ):
        prune(source, tmp_path / "out", scope=scope, criterion=criterion)
    assert {p.name for p in tmp_path.iterdir()} == {"dense"}


def test_options(dense: Path, tmp_path: Path) -> None:
    for options, text in (
        ({"scope": "model"}, "scope to be 'layer' or 'global'"),
        ({"normalize": "l2"}, "normalize to be 'auto', 'none', 'norm' or 'lamp'"),
        ({"batch_norm": "maybe"}, "batch_norm to be"),
        ({"order": "sideways"}, "order to be 'parallel', 'forward' or 'backward'"),
        ({"rounds": 0}, "rounds"),
        ({"order": "forward", "scope": "global"}, 'order="parallel" with scope="global"'),
        ({"criterion": "wanda"}, r"data for criterion 'wanda' \(a file of statistics\), got None"),
        ({"criterion": "wanda", "data": [1]}, r"data for criterion 'wanda' .*, got list"),
        ({"criterion": "lookahead", "data": "x"}, "no data for criterion 'lookahead'"),
        ({"criterion": lambda layer: layer.weight}, "the criterion to return finite scores >= 0"),
        ({"criterion": lambda layer: layer.weight[:1]}, "tensor of the weight's shape"),
        ({"exclude": ["nothing"]}, "exclude patterns that name a layer"),
        ({"layers": "nothing"}, "layers patterns that name a layer"),
        ({"sparsity": 1.5}, "0 <= sparsity <= 1"),
        ({"sparsity": {"x": 0.5}}, "a pattern that names a layer"),
        ({"memory": "4 buckets"}, 'memory such as "4GB"'),
        ({"memory": 0}, "memory > 0"),
        ({"example_inputs": None}, "expected example_inputs with model"),
        ({"model": None}, "expected config.json in"),
    ):
        with pytest.raises(ValueError, match=text):
            prune(dense, tmp_path / "out", **{"sparsity": 0.5, **options})
    with pytest.raises(TypeError, match=r"model to be a torch.nn.Module"):
        prune(dense, tmp_path / "out", model=3)
    with pytest.raises(TypeError, match="memory to be a string or a number, got float"):
        prune(dense, tmp_path / "out", memory=1e9)
    assert {p.name for p in tmp_path.iterdir()} == {"dense"}


def test_out_is_a_directory_of_its_own(dense: Path, tmp_path: Path) -> None:
    for out, text in (
        (dense, "out not to exist"),
        (dense / "out", "out outside of"),
        (tmp_path, "out not to exist"),
        (dense / "tokenizer.json", "out not to exist"),
    ):
        with pytest.raises(ValueError, match=text):
            prune(dense, out)
    (tmp_path / "out").mkdir()
    prune(dense, tmp_path / "out")  # empty: taken
    with pytest.raises(ValueError, match="out not to exist, or to be an empty directory"):
        prune(dense, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
def test_a_layer_without_weights(normalize: str, tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.full = nn.Linear(6, 0), nn.Linear(6, 8)

        def forward(self, x: Any) -> Any:
            return self.empty(x), self.full(x)

    net, options = Two(), {"scope": "global", "normalize": normalize}
    source = write(tmp_path / "dense", net.state_dict(), shards=1)
    got = prune(source, tmp_path / "out", 0.5, model=net, count_scores=True, **options)
    want = lap_ext.prune(net, torch.zeros(1, 6), 0.5, **options)
    assert got.masks == want.masks and list(got.layers) == list(want.layers)


def test_a_foreign_directory_in_the_way_is_not_removed(dense: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.lap_ext"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"nothing but an earlier run's files .* got thesis.txt"):
        prune(dense, tmp_path / "out")
    assert (work / "thesis.txt").read_text() == "years of work"


def test_copies_of_a_tied_weight_that_differ(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    state = dict(net.state_dict()) | {"2.weight": torch.ones(6, 6)}
    source = write(tmp_path / "dense", state)
    with pytest.raises(ValueError, match=r"expected '0.weight' and '2.weight' alike"):
        prune(source, tmp_path / "out", model=net)


def test_float64_beside_others(tmp_path: Path) -> None:
    state = network().state_dict()
    source = write(tmp_path / "dense", state | {"3.weight": state["3.weight"].double()})
    with pytest.raises(TypeError, match=r"to share one dtype .* torch.float64 for layer .3"):
        prune(source, tmp_path / "out", scope="global", normalize="none")
    prune(source, tmp_path / "norm", scope="global", normalize="norm")
    prune(source, tmp_path / "layer")


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no_architecture": (lambda c: c.pop("architectures"), "config.architectures to name one class"),
    "architecture": (lambda c: c.update(architectures=["Trainer"]), "config.architectures to name"),
    "two": (lambda c: c.update(architectures=["A", "B"]), "config.architectures to name one class"),
    "type": (lambda c: c.update(model_type="no_such_model"), "config.json that transformers"),
    "code": (
        lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
        "a config.json without code",
    ),
    "quantized": (
        lambda c: c.update(quantization_config={"quant_method": "fp8"}),
        "expected unquantized weights",
    ),
    "other_width": (lambda c: c.update(n_embd=16), "with the shape of 'transformer.wte.weight'"),
    "more_layers": (lambda c: c.update(n_layer=3), "got none"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, tmp_path: Path) -> None:
    saved("hf_gpt2_sdpa", tmp_path / "dense")
    change, text = CONFIGS[name]
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "dense" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    with pytest.raises((ValueError, TypeError), match=text):
        checkpoint.prune(tmp_path / "dense", tmp_path / "out", 0.5)
    assert not ran.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"dense"}
