# SPDX-License-Identifier: MIT
"""lap-ext on torch.export programs: the same results as on the module; no code in a file runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.cli import program
from tests.helpers.command_line import Run, one_line

Records = dict[str, bytes]


class Net(nn.Module):
    """A residual sum, a batch norm, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        return self.head(nn.functional.max_pool2d(x + self.conv(x), 2).flatten(1))


IMAGES = torch.ones(2, 3, 4, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a batch of any size."""
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(Net().eval(), (IMAGES,), dynamic_shapes=batch)
    torch.export.save(exported, path)
    return path


def test_prune_score_inspect(run: Run, saved: Path, tmp_path: Path) -> None:
    before = saved.read_bytes()
    net = Net().eval()
    status, out, error = run("prune", saved, "--sparsity", "0.75", "--out", "out", "--json")
    assert (status, error) == (0, "")
    result = lap_ext.prune(net, IMAGES, 0.75)
    assert [row["kept"] for row in json.loads(out)["layers"]] == [x.kept for x in result.layers]
    masks = lap_ext.Masks.load(tmp_path / "out/lap_ext_masks.safetensors")
    assert all(torch.equal(masks[name], mask) for name, mask in result.masks.items())
    exported, module = program.load(tmp_path / "out/model.pt2")
    for name, value in net.state_dict().items():
        assert torch.equal(exported.state_dict[name], value), name
    assert torch.equal(module(IMAGES), net(IMAGES)) and module(torch.ones(7, 3, 4, 4)).shape[0] == 7
    rows = json.loads(run("inspect", "out/model.pt2", "--json")[1])["layers"]
    assert [row["weights"] - row["zeros"] for row in rows] == [x.kept for x in result.layers]
    assert run("score", saved, "--out", "s")[0] == 0
    assert saved.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "out", "s"}


def test_a_program_of_another_torch(run: Run, saved: Path, tmp_path: Path) -> None:
    """What torch itself does not take is one line, too."""
    other = model(lambda facts: facts["schema_version"].update(major=99))
    edited(saved, tmp_path / "new.pt2", other)
    command = [sys.executable, "-m", "lap_ext", "inspect", "new.pt2"]
    environment = os.environ | {"PYTHONPATH": str(Path(lap_ext.__file__).parent.parent)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    line = one_line((done.returncode, done.stdout, done.stderr))
    assert "by a version that torch" in line
    assert run("inspect", "new.pt2")[0] == 2


def test_inputs(run: Run, saved: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pt2"
    edited(saved, bare, lambda records: records.update({"data/sample_inputs/model.pt": b""}))
    assert "Pass --input 1x3x224x224" in one_line(run("inspect", bare))
    assert run("inspect", bare, "--input", "3x3x4x4")[0] == 0
    line = one_line(run("inspect", saved, "--checkpoint", "w.safetensors"))
    assert "a program has its weights" in line


def test_positional_and_named_inputs(run: Run, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.b(self.a(x).relu() * scale)

    inputs = (torch.ones(2, 4),), {"scale": torch.ones(1)}
    torch.export.save(torch.export.export(Scaled().eval(), *inputs), tmp_path / "net.pt2")
    status, out, _ = run("prune", "net.pt2", "--sparsity", "0.5", "--out", "out", "--json")
    assert status == 0 and json.loads(out)["kept"] == 9
    exported, module = program.load(tmp_path / "out/model.pt2")
    assert exported.example_inputs[1].keys() == {"scale"}
    assert module(*inputs[0], **inputs[1]).shape == (2, 2)


def test_guards_are_kept_and_never_run(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "guarded.pt2"
    code = f"open({str(tmp_path / 'sprung')!r}, 'w')"
    edited(saved, path, model(lambda facts: facts.update(guards_code=[code])))
    exported, module = program.load(path)
    assert module(IMAGES).shape == (2, 5) and exported._guards_code == [code]
    assert not (tmp_path / "sprung").exists()


# --- hostile files --------------------------------------------------------------------------------


def edited(source: Path, target: Path, edit: Callable[[Records], object]) -> None:
    """The same archive with other records."""
    with zipfile.ZipFile(source) as file:
        top = file.namelist()[0].partition("/")[0]
        records = {name.removeprefix(f"{top}/"): file.read(name) for name in file.namelist()}
    edit(records)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as file:
        for name, data in records.items():
            file.writestr(f"{top}/{name}", data)


def record(name: str, change: Callable[[Any], object]) -> Callable[[Records], object]:
    """An edit of a JSON record."""

    def edit(records: Records) -> None:
        facts = json.loads(records[name])
        change(facts)
        records[name] = json.dumps(facts).encode()

    return edit


def model(change: Callable[[Any], object]) -> Callable[[Records], object]:
    return record("models/model.json", change)


def node(**changes: Any) -> Callable[[Records], object]:
    """An edit of the first operation."""
    return model(lambda facts: facts["graph_module"]["graph"]["nodes"][0].update(changes))


def weights(change: Callable[[Any], object]) -> Callable[[Records], object]:
    name = "data/weights/model_weights_config.json"
    return record(name, lambda facts: change(facts["config"]["stem.weight"]))


class Trap:
    """What a pickle runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("sprung", "w"))


def pickled(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


CODE = "open('sprung','w')"
SPEC = '[1, {"type": %s, "context": %s, "children_spec": []}]'


def signature(facts: Any) -> Any:
    return facts["graph_module"]["module_call_graph"][0]["signature"]


def sizes(facts: Any) -> Any:
    return facts["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]


HOSTILE: dict[str, tuple[Callable[[Records], object], str]] = {
    "inputs": (
        lambda r: r.update({"data/sample_inputs/model.pt": pickled(((Trap(),), {}))}),
        "example inputs that are not plain tensors",
    ),
    "raw pickle": (
        lambda r: r.update({"data/sample_inputs/model.pt": pickle.dumps(Trap())}),
        "example inputs that are not plain tensors",
    ),
    "pickled weight": (weights(lambda x: x.update(use_pickle=True)), "the pickled tensor"),
    "use_pickle is 1": (weights(lambda x: x.update(use_pickle=1)), "the pickled tensor"),
    "old weights": (
        lambda r: r.update({"data/weights/model.pt": pickled({"w": Trap()})}), "record"
    ),
    "old constants": (lambda r: r.update({"data/constants/model.pt": pickled(Trap())}), "record"),
    "object": (lambda r: r.update({"data/constants/opaque_obj_0": pickle.dumps(Trap())}), "record"),
    "object in the table": (
        record(
            "data/constants/model_constants_config.json",
            lambda facts: facts["config"].update(
                x={"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False,
                   "tensor_meta": None}
            ),
        ),
        "the tensor 'opaque_obj_0'",
    ),
    "compiled code": (lambda r: r.update({"data/aotinductor/model/x.so": b"\x7fELF"}), "record"),
    "two models": (lambda r: r.update({"models/other.json": r["models/model.json"]}), "2 models"),
    "no model": (lambda r: r.pop("models/model.json"), "0 models"),
    "expression": (model(lambda f: sizes(f)[0]["as_expr"].update(expr_str=CODE)), "expr_str"),
    "expression, name": (
        model(lambda f: sizes(f)[0]["as_expr"].update(expr_str="Symbol('s77', x=exec)")),
        "expr_str",
    ),
    "expression, attribute": (
        model(lambda f: sizes(f)[0]["as_expr"].update(expr_str="Symbol('s77').func")),
        "expr_str",
    ),
    "expression, text": (
        model(lambda f: sizes(f)[0]["as_expr"].update(expr_str=f"Symbol({CODE!r})")),
        "expr_str",
    ),
    "system": (node(target="torch.os.system"), "the operation 'torch.os.system'"),
    "load": (node(target="torch.load"), "the operation"),
    "from_file": (node(target="torch.ops.aten.from_file.default"), "the operation"),
    "control flow": (node(target="torch.ops.higher_order.cond"), "the operation"),
    "operator": (node(target="_operator.attrgetter"), "the operation"),
    "operator, deeper": (node(target="_operator.add.__self__"), "the operation"),
    "class": (node(target="torch.ops.aten.__class__.mro"), "the operation"),
    "no overload": (node(target="torch.ops.aten.relu.__call__"), "the operation"),
    "text": (node(target=CODE), "target"),
    "name": (node(name=f"x); {CODE}"), "name"),
    "output": (node(outputs=[{"as_tensor": {"name": f"x\n    {CODE}"}}]), "name"),
    "object argument": (
        node(inputs=[{"name": "x", "arg": {"as_custom_obj": {"name": "x", "class_fqn": "y"}}}]),
        "a value 'as_custom_obj'",
    ),
    "operation argument": (
        node(inputs=[{"name": "x", "arg": {"as_operator": "torch.os.system"}}]),
        "a value 'as_operator'",
    ),
    "name, dotted": (node(name="torch.os"), "name 'torch.os'"),
    "text that is a table": (
        node(inputs=[{"name": "x", "arg": {"as_string": {CODE: CODE}}}]), "the name"
    ),
    "texts in a table": (
        node(inputs=[{"name": "x", "arg": {"as_string": {"x": CODE}}}]), "x \"open"
    ),
    "argument names": (
        model(lambda f: signature(f).update(forward_arg_names=["a.b"])), "forward_arg_names 'a.b'"
    ),
    "key": (
        model(lambda f: f["graph_module"]["graph"]["tensor_values"].update({CODE: {}})),
        "the name",
    ),
    "argument name": (
        model(lambda f: signature(f).update(forward_arg_names=[f"x={CODE}"])), "x=open"
    ),
    "structure": (
        model(lambda f: signature(f).update(in_spec=SPEC % ('"os.system"', "null"))), "in_spec"
    ),
    "structure, names": (
        model(
            lambda f: signature(f).update(
                out_spec=SPEC % ('"builtins.dict"', json.dumps(json.dumps([CODE])))
            )
        ),
        "out_spec",
    ),
    "structure, enum": (
        model(
            lambda f: signature(f).update(
                out_spec=SPEC % ('"builtins.dict"', json.dumps('{"__enum__": true}'))
            )
        ),
        "out_spec",
    ),
    "named tuples": (
        model(
            lambda f: f["graph_module"].update(
                treespec_namedtuple_fields={"x": {"field_names": []}}
            )
        ),
        "'treespec_namedtuple_fields'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_programs(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """None is handed to torch.export.load."""
    monkeypatch.chdir(tmp_path)
    edit, said = HOSTILE[case]
    edited(saved, tmp_path / "bad.pt2", edit)
    monkeypatch.setattr(torch.export, "load", lambda file: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="expected a program that cannot execute code") as caught:
        program.load(Path("bad.pt2"))
    assert said in str(caught.value) and "write a factory" in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_rewriting_alone_is_harmless(saved: Path, tmp_path: Path) -> None:
    edited(saved, tmp_path / "same.pt2", lambda records: None)
    assert torch.equal(program.load(tmp_path / "same.pt2")[1](IMAGES), Net().eval()(IMAGES))


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: pickle.dumps(Trap()),
        lambda data: pickled({"w": torch.ones(2)}),  # a zip of torch.save
        lambda data: data.replace(b'"nodes"', b'"nodez"'),
    ],
    ids=["truncated", "empty", "pickle", "state_dict", "other keys"],
)
def test_damaged_programs(run: Run, saved: Path, harm: Callable[[bytes], bytes]) -> None:
    Path("bad.pt2").write_bytes(harm(saved.read_bytes()))
    assert "expected a program" in one_line(
        run("prune", "bad.pt2", "--sparsity", "0", "--out", "o")
    )
    assert not Path("sprung").exists() and not Path("o").exists()
