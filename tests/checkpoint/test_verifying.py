# SPDX-License-Identifier: MIT
"""checkpoint.verify: what was changed in a pruned checkpoint is found, and nothing else."""

from __future__ import annotations

import json
import os
import re
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
from lap_ext.checkpoint import reading, record
from tests.helpers.checkpoints import change, network, prune, saved, write

OPTIONS = {"sparsity": ["0.5"], "scope": "layer"}
UNPRUNED = ("all layers", "nothing is pruned: the two have the same weights")


@pytest.fixture
def pruned(dense: Path, tmp_path: Path) -> Path:
    """The checkpoint of network(), pruned by half, with a record."""
    out = tmp_path / "out"
    record.write(out, OPTIONS, prune(dense, out, 0.5))
    return out


def problems(verdict: checkpoint.Verdict) -> set[tuple[str, str]]:
    return {(x.tensor, x.problem) for x in verdict.findings}


def test_all_is_well(dense: Path, pruned: Path) -> None:
    before = {path: path.read_bytes() for path in [*dense.iterdir(), *pruned.iterdir()]}
    verdict = checkpoint.verify(pruned, dense)
    assert verdict.ok and verdict.masks and verdict.tensors == len(network().state_dict())
    counts = {name: p.numel() for name, p in network().named_parameters() if p.dim() > 1}
    assert [(row.name, row.kept, row.total) for row in verdict.layers] == [
        (name.removesuffix(".weight"), count // 2, count) for name, count in counts.items()
    ]
    assert verdict.sparsity == 0.5
    assert "every kept weight has its original's bits" in str(verdict)
    assert (
        verdict._repr_html_().startswith("<table>") and "tensors compared" in verdict._repr_html_()
    )
    told = verdict.to_dict()
    assert told["ok"] and told["findings"] == [] and told["layers"][0]["name"] == "0"
    assert (told["kept"], told["total"], told["sparsity"]) == (verdict.kept, verdict.total, 0.5)
    assert before == {path: path.read_bytes() for path in [*dense.iterdir(), *pruned.iterdir()]}


@pytest.mark.parametrize("chunk", [64, 1 << 24])
def test_changed_weights(
    dense: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK", chunk)
    mask = lap_ext.Masks.load(pruned / "lap_ext_masks.safetensors")["3"]
    kept, gone = mask.nonzero()[[5, -1]].tolist(), (~mask).nonzero()[-2].tolist()

    def edit(weight: torch.Tensor) -> None:
        weight.view(torch.int32)[tuple(kept[0])] ^= 1  # the last bit
        weight[tuple(kept[1])] = 0.0
        weight[tuple(gone)] = -0.0  # zero, but not the zero that is written

    change(pruned, "3.weight", edit)
    change(pruned, "1.weight", lambda weight: weight[3].fill_(7))
    verdict = checkpoint.verify(pruned, dense)
    assert not verdict.ok
    assert problems(verdict) == {
        ("3.weight", "2 kept weights differ from the original (1 of them zero)"),
        ("3.weight", "1 pruned weights are not zero"),
        ("1.weight", "1 elements differ from the original"),
    }
    assert sorted(x.count for x in verdict.findings) == [1, 1, 2]
    assert f"3 findings in {verdict.tensors} tensors." in str(verdict)


def test_revived_weights(dense: Path, pruned: Path) -> None:
    """A pruned weight that has its original's bits again."""
    original = network().state_dict()["5.weight"]
    change(pruned, "5.weight", lambda weight: weight.copy_(original))
    gone = 70 * 9 // 2
    assert problems(checkpoint.verify(pruned, dense)) == {
        ("5.weight", f"{gone} pruned weights are not zero")
    }


def test_counts(dense: Path, pruned: Path) -> None:
    """A mask with a weight less is found though weights and mask agree."""
    path = pruned / "lap_ext_masks.safetensors"
    masks = {name: mask.clone() for name, mask in lap_ext.Masks.load(path).items()}
    first = tuple(masks["5"].nonzero()[0].tolist())
    masks["5"][first] = False
    lap_ext.Masks(masks).save(path)
    change(pruned, "5.weight", lambda weight: weight[first].zero_())
    less = ("5", "314 weights are kept, a sparsity of 0.5 keeps 315")
    recorded = ("5", "(kept, total) is (314, 630) in the masks, (315, 630) recorded")
    assert problems(checkpoint.verify(pruned, dense)) == {less, recorded}
    assert problems(checkpoint.verify(pruned, dense, sparsity=1 - 314 / 630)) > {recorded}
    (pruned / "lap_ext.json").unlink()
    assert checkpoint.verify(pruned, dense).ok
    assert problems(checkpoint.verify(pruned, dense, sparsity=0.5)) == {less}
    kept = 450 + 5250 + 314
    assert problems(checkpoint.verify(pruned, dense, sparsity=0.5, scope="global")) == {
        ("all layers", f"{kept} weights are kept, a sparsity of 0.5 keeps {kept + 1}")
    }


@pytest.mark.parametrize(
    ("sparsity", "text"),
    [
        (0.75, "0.75"),
        ({"5": 0.75, "*": 0.5}, "5=0.75, *=0.5"),
        (lap_ext.erk(0.9), "erk:0.9"),
        (
            lap_ext.allocation.compounded([0.1, 0.2, 0.3], 1),
            "compounded(ratios=[0.1, 0.2, 0.3], times=1)",
        ),
    ],
    ids=str,
)
def test_another_sparsity(dense: Path, pruned: Path, sparsity: Any, text: str) -> None:
    keeps = lap_ext.allocation.of(sparsity).keeps({"0": (150, 6), "3": (70, 150), "5": (9, 70)})
    assert problems(checkpoint.verify(pruned, dense, sparsity=sparsity)) == {
        (name, f"{count} weights are kept, a sparsity of {text} keeps {keeps[name]}")
        for name, count in {"0": 450, "3": 5250, "5": 315}.items()
        if keeps[name] != count
    }


def test_a_recorded_global_sparsity(dense: Path, tmp_path: Path) -> None:
    result = prune(dense, tmp_path / "out", 0.9, scope="global")
    record.write(tmp_path / "out", {"sparsity": ["0.9"], "scope": "global"}, result)
    assert checkpoint.verify(tmp_path / "out", dense).ok
    record.write(tmp_path / "out", {"sparsity": ["uniform:0.5"], "scope": "global"}, result)
    (finding,) = checkpoint.verify(tmp_path / "out", dense).findings
    assert finding.problem.endswith("a sparsity of uniform:0.5 keeps 6015")


ROW = '{"layers": [{"name": "0", "kept": %s, "total": 900}], "asked": null}'


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"layers": 3}',
        '{"layers": [3]}',
        '{"layers": {}, "asked": {"sparsity": ["0.5"], "scope": "layer"}}',
        '{"layers": [], "layers": [], "asked": {"sparsity": ["0.5"], "scope": "layer"}}',
        ROW % "1e400",
        ROW % "-1e400",
        ROW % "NaN",
        ROW % "Infinity",
        ROW % "1.5",
        ROW % "true",
        ROW % '"450"',
        ROW % "-1",
        ROW % "901",
        ROW % ("9" * 5000),
        ROW % ("9" * 4000),
        ROW % "[450]",
        '{"layers": [{"name": 5, "kept": 1, "total": 2}]}',
        '{"layers": [{"name": ["0"], "kept": 1, "total": 2}]}',
        '{"layers": [{"name": "0", "kept": 450, "total": 900}, '
        '{"name": "0", "kept": 450, "total": 900}]}',
        '{"layers": [], "asked": {"sparsity": "0.5", "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": {"0.5": 1}, "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": [], "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": ["1e400"], "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": ["nan"], "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": ["erk:1e400"], "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": ["nothing=0.5"], "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": ["0.5"], "scope": ["layer"]}}',
        "[" * 1_000_000,
        '{"a":' * 1_000_000,
        '{"layers": [], "asked": {"sparsity": ["half"], "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": [0.5], "scope": "layer"}}',
        '{"layers": [], "asked": {"sparsity": ["0.5"], "scope": "rows"}}',
        "[" * 100_000,
    ],
    ids=lambda text: f"{text[:70]} {len(text)}",
)
def test_damaged_records(dense: Path, pruned: Path, text: str) -> None:
    (pruned / "lap_ext.json").write_text(text)
    found = problems(checkpoint.verify(pruned, dense))
    assert ("lap_ext.json", "it is damaged") in found
    assert all(name == "lap_ext.json" or "450" in problem or "None rec" in problem
               for name, problem in found)  # fmt: skip


def test_records_that_are_no_file_or_endless(dense: Path, pruned: Path) -> None:
    path = pruned / "lap_ext.json"
    path.unlink()
    path.mkdir()
    assert problems(checkpoint.verify(pruned, dense)) == {("lap_ext.json", "it is damaged")}
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(3 << 30)  # a hole: nothing is written
    assert problems(checkpoint.verify(pruned, dense)) == {("lap_ext.json", "it is damaged")}


def test_a_damaged_record_is_no_other_error(pruned: Path) -> None:
    (pruned / "lap_ext.json").write_text(ROW % "1e400")
    with pytest.raises(ValueError, match=r"expected an undamaged lap_ext\.json"):
        record.read(pruned)


# --- the other files ------------------------------------------------------------------------------


def test_other_files(dense: Path, tmp_path: Path) -> None:
    """Changed, lacking, of the same size or not; what the pruned one has besides is its own."""
    files = {"config.json": "{}", "merges.txt": "a b", "deep/er/vocab.json": "x" * 3_000_000}
    for name, text in files.items():
        (dense / name).parent.mkdir(parents=True, exist_ok=True)
        (dense / name).write_text(text)
    (dense / ".cache").mkdir()
    (dense / ".cache" / "lock").write_text("the hub's own")
    (dense / "lap_ext.json").write_text("that of an earlier pruning")
    prune(dense, tmp_path / "out", 0.5)
    out = tmp_path / "out"
    (out / "lap_ext.json").unlink()
    (out / "report.html").write_text("more")
    verdict = checkpoint.verify(out, dense)
    assert verdict.ok and verdict.files == 4 and verdict.to_dict()["files"] == 4
    assert "4 other files are the same" in str(verdict)
    (out / "config.json").write_text("[]")
    (out / "merges.txt").unlink()
    (out / "deep" / "er" / "vocab.json").write_text("x" * 2_999_999 + "y")
    (out / "tokenizer.json").write_text("{} ")
    verdict = checkpoint.verify(out, dense)
    changed = "its bytes are not those of the original"
    assert problems(verdict) == {
        ("config.json", changed),
        ("merges.txt", "the pruned checkpoint lacks it"),
        ("deep/er/vocab.json", changed),
        ("tokenizer.json", changed),
    }
    (out / "merges.txt").mkdir()
    assert ("merges.txt", "the pruned checkpoint lacks it") in problems(
        checkpoint.verify(out, dense)
    )


def test_other_files_of_a_factory_s_output_or_a_single_file(dense: Path, pruned: Path) -> None:
    """Where there are weights alone, nothing else is demanded."""
    (dense / "config.json").write_text("{}")
    assert not checkpoint.verify(pruned, dense).ok
    single = pruned / "model.safetensors"
    tensors = {k: v for x in pruned.glob("model-*") for k, v in load_file(x).items()}
    for path in [*pruned.glob("model*"), pruned / "tokenizer.json"]:
        path.unlink()
    save_file(tensors, single)
    verdict = checkpoint.verify(pruned, dense)
    assert verdict.ok and verdict.files == 0 and "other files" not in str(verdict)
    (pruned / "readme").write_text("a file that is neither weights nor ours")
    assert not checkpoint.verify(pruned, dense).ok
    assert checkpoint.verify(single, dense).ok


def test_a_pipe_in_place_of_a_file(dense: Path, pruned: Path) -> None:
    (pruned / "tokenizer.json").unlink()
    os.mkfifo(pruned / "tokenizer.json")
    try:
        found = problems(checkpoint.verify(pruned, dense))
    except ValueError as error:  # a directory with pipes is refused altogether
        assert "tokenizer.json" in str(error)
    else:
        assert found == {("tokenizer.json", "the pruned checkpoint lacks it")}


def test_a_sparsity_needs_no_record_of_one(dense: Path, pruned: Path) -> None:
    """The recorded counts are checked where the options are lost and a sparsity is given."""
    path = pruned / "lap_ext.json"
    counts = [
        {"name": row.name, "kept": row.kept, "total": row.total}
        for row in checkpoint.verify(pruned, dense).layers
    ]
    path.write_text(json.dumps({"layers": counts}))
    assert ("lap_ext.json", "it is damaged") in problems(checkpoint.verify(pruned, dense))
    assert problems(checkpoint.verify(pruned, dense, sparsity=0.5)) == set()
    counts[0]["kept"] += 1
    path.write_text(json.dumps({"layers": counts}))
    ((name, problem),) = problems(checkpoint.verify(pruned, dense, sparsity=0.5))
    assert name == counts[0]["name"] and "recorded" in problem


def test_a_wrong_sparsity_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.verify: expected 0 <= sparsity <= 1"):
        checkpoint.verify(tmp_path / "none", tmp_path / "none", sparsity=1.5)


def test_the_record_has_all_options(dense: Path, tmp_path: Path) -> None:
    result = prune(dense, tmp_path / "out", lap_ext.erk(0.5))
    record.write(
        tmp_path / "out",
        {"sparsity": ["erk:0.5"], "scope": "layer", "batch_norm": "ignore"},
        result,
    )
    facts = json.loads((tmp_path / "out" / "lap_ext.json").read_text())
    assert facts["lap_ext"] == lap_ext.__version__ and facts["asked"]["batch_norm"] == "ignore"
    recorded = record.read(tmp_path / "out")
    assert recorded is not None and recorded.wanted() == (lap_ext.erk(0.5), "layer", None)
    assert recorded.counts == {row.name: (row.kept, row.total) for row in result.layers}
    assert record.read(dense) is None


def test_damaged_masks(dense: Path, pruned: Path) -> None:
    save_file({"5": torch.zeros(3)}, pruned / "lap_ext_masks.safetensors")
    said = r"^checkpoint.verify: expected a file written by Masks.save"
    with pytest.raises(ValueError, match=said):
        checkpoint.verify(pruned, dense)
    os.truncate(pruned / "lap_ext_masks.safetensors", 20)
    with pytest.raises(ValueError, match=said):
        checkpoint.verify(pruned, dense)


def test_a_mask_of_no_tensor(dense: Path, pruned: Path) -> None:
    path = pruned / "lap_ext_masks.safetensors"
    masks = dict(lap_ext.Masks.load(path).items())
    lap_ext.Masks(masks | {"nothing": torch.ones(2, 2, dtype=torch.bool)}).save(path)
    (pruned / "lap_ext.json").unlink()
    assert problems(checkpoint.verify(pruned, dense)) == {
        ("nothing", "a mask for a tensor that the original does not have")
    }


def test_without_masks(dense: Path, pruned: Path) -> None:
    (pruned / "lap_ext_masks.safetensors").unlink()
    (pruned / "lap_ext.json").unlink()
    verdict = checkpoint.verify(pruned, dense, sparsity=0.5)
    assert verdict.ok and not verdict.masks and "zeros were taken for pruned" in str(verdict)
    assert {row.name: row.kept for row in verdict.layers} == {"0": 450, "3": 5250, "5": 315}
    change(pruned, "5.weight", lambda weight: weight[0, 0].fill_(5))
    assert ("5.weight", "1 elements differ from the original") in problems(
        checkpoint.verify(pruned, dense)
    )


def test_other_tensors(dense: Path, tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.bias"], state["3.bias"] = state["0.bias"].double(), state["3.bias"][:5]
    state["more"] = state.pop("5.bias")
    other = write(tmp_path / "other", state)
    assert problems(checkpoint.verify(other, dense)) == {
        ("0.bias", "F64 [150], in the original F32 [150]"),
        ("3.bias", "F32 [5], in the original F32 [70]"),
        ("5.bias", "the pruned checkpoint lacks it"),
        ("more", "the original does not have it"),
    }


def test_dtypes_of_other_tensors(tmp_path: Path) -> None:
    """Whole numbers, bytes and empty ones are compared bit by bit too."""
    extra = {"steps": torch.arange(5), "scale": torch.ones(3).to(torch.float8_e4m3fn),
             "empty": torch.zeros(0, 4), "flag": torch.tensor(True)}  # fmt: skip
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(extra, one)
    save_file(extra, two)
    assert problems(checkpoint.verify(one, two)) == {UNPRUNED}
    save_file(extra | {"steps": torch.tensor([0, 1, 2, 3, 1 << 40])}, two)
    assert problems(checkpoint.verify(one, two)) == {
        ("steps", "1 elements differ from the original")
    }


def test_files(dense: Path, tmp_path: Path) -> None:
    save_file(load_file(next(dense.glob("*00001*"))), tmp_path / "part.safetensors")
    found = checkpoint.verify(next(dense.glob("*00001*")), tmp_path / "part.safetensors")
    assert problems(found) == {UNPRUNED}
    for path in (tmp_path / "no", tmp_path / "w.pt"):
        with pytest.raises(ValueError, match=r"^checkpoint.verify: expected a checkpoint dir"):
            checkpoint.verify(dense, path)
    os.truncate(tmp_path / "part.safetensors", 100)
    with pytest.raises(ValueError, match=r"^checkpoint.verify: .* Download it again"):
        checkpoint.verify(tmp_path / "part.safetensors", dense)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_an_unpruned_checkpoint(dense: Path, tmp_path: Path, sparsity: float | None) -> None:
    """It may have zeros, as long as the original has them too."""
    change(dense, "5.weight", lambda weight: weight[2].zero_())
    shutil.copytree(dense, tmp_path / "copy")
    verdict = checkpoint.verify(tmp_path / "copy", dense, sparsity=sparsity)
    assert UNPRUNED in problems(verdict) and "nothing is pruned" in str(verdict)


@pytest.mark.parametrize("masks", [True, False])
def test_the_two_in_the_wrong_order(dense: Path, pruned: Path, tmp_path: Path, masks: bool) -> None:
    """The pruned one in place of the original, or one that is pruned more in place of it."""
    (pruned / "lap_ext.json").unlink()
    prune(dense, tmp_path / "more", 0.75)
    if not masks:
        (pruned / "lap_ext_masks.safetensors").unlink()
    said = "are the two in the wrong order? The pruned one comes first"
    for first, second, count in ((dense, pruned, 6015), (pruned, tmp_path / "more", 3007)):
        first_of_all = checkpoint.verify(first, second).findings[0]
        assert (first_of_all.tensor, first_of_all.count) == ("all layers", count)
        assert first_of_all.problem.endswith(said)
    right, itself = checkpoint.verify(pruned, dense), checkpoint.verify(pruned, pruned)
    assert right.ok and not right.unpruned and "Nothing is pruned" not in str(right)
    assert itself.unpruned and itself.ok == masks and "othing is pruned" in str(itself)
    assert "nothing is pruned" in itself.summary()
    change(pruned, "0.bias", lambda bias: bias[1].add_(1))  # no pruning does that
    assert all(said not in x.problem for x in checkpoint.verify(dense, pruned).findings)


def test_a_bias_of_zeros_that_has_changed_is_no_wrong_order(dense: Path, pruned: Path) -> None:
    change(dense, "0.bias", lambda bias: bias.zero_())
    change(pruned, "0.bias", lambda bias: bias.fill_(1))
    found = problems(checkpoint.verify(pruned, dense))
    assert found == {("0.bias", "150 elements differ from the original")}


def with_a_head(directory: Path, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Saves GPT-2, whose config ties the head to the embedding, with a stored head beside it."""
    saved("hf_gpt2_sdpa", directory)
    tensors = {}
    for path in [*directory.glob("model*.safetensors")]:
        tensors |= load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink()
    tensors["lm_head.weight"] = head(tensors["transformer.wte.weight"]).contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("layers", ["*", "transformer*"])
def test_a_head_of_its_own_where_the_config_ties(tmp_path: Path, layers: str) -> None:
    """As transformers loads it: what is stored differently is not tied."""
    dense, out = with_a_head(tmp_path / "dense", lambda table: table.flip(0)), tmp_path / "out"
    checkpoint.prune(dense, out, 0.5, layers=layers)
    verdict = checkpoint.verify(out, dense)
    assert verdict.ok, str(verdict)
    change(out, "lm_head.weight", lambda weight: weight[3].fill_(7))
    assert {x.tensor for x in checkpoint.verify(out, dense).findings} == {"lm_head.weight"}


def test_a_tied_copy_that_is_stored_too(tmp_path: Path) -> None:
    """It has no mask of its own, and is pruned with the layer that it is a copy of."""
    dense, out = with_a_head(tmp_path / "dense", torch.clone), tmp_path / "out"
    checkpoint.prune(dense, out, 0.5, layers="*")
    assert checkpoint.verify(out, dense).ok
    assert load_file(out / "model.safetensors")["lm_head.weight"].eq(0).any()
    change(out, "lm_head.weight", lambda weight: weight[3].fill_(7))
    found = problems(checkpoint.verify(out, dense))
    assert any("kept weights differ" in problem for _, problem in found)


@pytest.mark.parametrize("name", ["hf_gpt2_sdpa", "hf_qwen3_moe"])
def test_tied_weights_and_experts(name: str, tmp_path: Path) -> None:
    """The model of config.json knows which tensors are slices or copies of a layer."""
    saved(name, tmp_path / "dense")
    result = checkpoint.prune(tmp_path / "dense", tmp_path / "out", 0.5)
    verdict = checkpoint.verify(tmp_path / "out", tmp_path / "dense", sparsity=0.5)
    assert verdict.ok
    assert {row.name: row.kept for row in verdict.layers} == {x.name: x.kept for x in result.layers}


def test_a_weight_that_is_tied_and_stored_twice(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    twice = {f"{name}.weight": net[0].weight.detach().clone() for name in "02"}
    source = write(tmp_path / "dense", twice)
    prune(source, tmp_path / "out", 0.5, model=net, save_masks=False)
    assert checkpoint.verify(tmp_path / "out", source, sparsity=0.5).ok


def test_progress_adds_up(dense: Path, pruned: Path) -> None:
    seen: list[checkpoint.Progress] = []
    checkpoint.verify(pruned, dense, on_progress=seen.append)
    assert {x.step for x in seen} == {"verify"}
    assert [x.done for x in seen] == sorted(x.done for x in seen)
    assert seen[-1].done == seen[-1].total


def test_mistakes(dense: Path, pruned: Path) -> None:
    for options, kind, said in (
        ({"scope": "rows"}, ValueError, "checkpoint.verify: expected scope to be 'layer' or"),
        ({"sparsity": "0.5"}, TypeError, "checkpoint.verify: expected sparsity to be"),
        ({"sparsity": {"x": 0.5}}, ValueError, "checkpoint.verify: expected a pattern that names"),
    ):
        with pytest.raises(kind, match=f"^{re.escape(said)}"):
            checkpoint.verify(pruned, dense, **options)
