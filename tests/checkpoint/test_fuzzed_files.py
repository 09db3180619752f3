# SPDX-License-Identifier: MIT
"""Mutated files: each ends in one error of lap_ext, or in a right result, within bounds.

A few in every run; by hand any number, other ones each time:
LAP_EXT_FUZZ=20000 HYPOTHESIS_PROFILE=explore pytest tests/checkpoint/test_fuzzed_files.py
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import lap_ext
from lap_ext import Masks, checkpoint
from lap_ext.checkpoint import files, hf, record
from lap_ext.checkpoint.files import MASKS
from lap_ext.checkpoint.stored import stored_pruning
from lap_ext.errors import LapError
from tests.helpers.checkpoints import bits, saved, write
from tests.helpers.mutations import bounded, change, clear, fresh

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
INPUTS = torch.zeros(1, 4)

fuzzed = settings(max_examples=int(os.environ.get("LAP_EXT_FUZZ", "25")))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def prune(source: Path, out: Path, **options: Any) -> Any:
    options = {"model": network(), "example_inputs": INPUTS} | options
    return checkpoint.prune(source, out, 0.5, **options)


def ends(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns a result, or None after an error of lap_ext; any other exception is a failure."""
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*args, **options)
        except (LapError, OSError) as error:
            text = str(error)
            assert len(text) < 4000 and text.isprintable(), text
            assert not isinstance(error, TimeoutError), text
            return None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint, `base`; the pruned one, `after`; a stopped run, `stopped`."""
    place = tmp_path_factory.mktemp("fuzzed")
    base = write(place / "base", network().state_dict())
    result = prune(base, place / "after")
    record.write(place / "after", {"sparsity": ["0.5"], "scope": "layer"}, result)

    def stop(progress: checkpoint.Progress) -> None:
        if progress.step == "write" and progress.done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(base, place / "out", on_progress=stop)
    (place / ".out.lap_ext").rename(place / "stopped")
    return place


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    paths = sorted(directory.glob("model*.safetensors"))
    return {name: x for path in paths for name, x in load_file(path).items()}


def check_right(source: Path, out: Path) -> None:
    """Checks that a pruned checkpoint is what pruning its weights in memory gives."""
    net = network()
    stored, got = tensors(source), tensors(out)
    net.load_state_dict({name: stored[name] for name in net.state_dict()}, strict=True)
    model = copy.deepcopy(net)
    lap_ext.prune(model, INPUTS, 0.5)
    for name, want in model.state_dict().items():
        assert torch.equal(bits(got[name].to(want.dtype)), bits(want)), name


@pytest.mark.parametrize("name", [SHARD, INDEX])
@fuzzed
@given(data=st.data())
def test_weights(name: str, place: Path, data: st.DataObject) -> None:
    source, out = fresh(place / "base", place / "in"), place / "out"
    clear(out)
    change(data, source / name, text=name == INDEX)
    if ends(prune, source, out) is None:
        assert not out.exists() and not (place / ".out.lap_ext").exists()
    else:
        check_right(source, out)
        assert checkpoint.verify(out, source).ok


@fuzzed
@given(data=st.data())
def test_a_stopped_run(place: Path, data: st.DataObject) -> None:
    """Whatever is changed in the working directory, the result is that of a run from nothing."""
    out = place / "out"
    clear(out)
    work = fresh(place / "stopped", place / ".out.lap_ext")
    left = sorted(path for path in work.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(left), label="file")
    if path.suffix in (".json", ".safetensors"):
        change(data, path, text=path.suffix == ".json")
    else:
        path.write_bytes(b"x")
    if ends(prune, place / "base", out) is not None:
        for path in (place / "after").glob("*.safetensors"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@fuzzed
@given(data=st.data())
def test_masks(place: Path, data: st.DataObject) -> None:
    after = fresh(place / "after", place / "pruned")
    change(data, after / MASKS)
    masks = ends(Masks.load, after / MASKS)
    assert masks is None or masks == Masks.load(place / "after" / MASKS)
    verdict = ends(checkpoint.verify, after, place / "base")
    if verdict is not None and masks is not None:
        assert verdict.ok


@fuzzed
@given(data=st.data())
def test_the_record(place: Path, data: st.DataObject) -> None:
    after = fresh(place / "after", place / "pruned")
    change(data, after / record.RECORD, text=True)
    ends(checkpoint.verify, after, place / "base")
    ends(stored_pruning, after)


@fuzzed
@given(data=st.data())
def test_a_printed_result(place: Path, data: st.DataObject) -> None:
    out = str(place / "after")
    printed = fresh(place / "after", place / "pruned") / "printed.json"
    printed.write_text(json.dumps({"criterion": "magnitude", "model": "base", "out": out}))
    change(data, printed, text=True)
    found = ends(stored_pruning, printed)
    assert found is None or found.directory.is_dir()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzzed") / "llama"
    saved("hf_llama_eager", directory)
    return directory


@fuzzed
@given(data=st.data())
def test_a_config(llama: Path, data: st.DataObject) -> None:
    source = fresh(llama, llama.parent / "in")
    change(data, source / "config.json", text=True)

    def built() -> object:  # the trace, which sees no file, takes most of the time of a run
        return hf.inputs(hf.build(files.open_directory(source)))

    ends(built)


def test_bounds_are_kept() -> None:
    """What the tests above rely on."""
    with pytest.raises(MemoryError), bounded():
        bytearray(3 * 10**9)
