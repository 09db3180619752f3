# SPDX-License-Identifier: MIT
"""What `import lap_ext` offers: the names of the stub, loaded on demand, and submodules."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

import lap_ext
from lap_ext import checkpoint, options

SOURCES = sorted(Path(lap_ext.__file__).parent.rglob("*.py"))
STUBS = sorted(Path(lap_ext.__file__).parent.rglob("__init__.pyi"))
NAMES = """
    score mask prune_ neighbor_norms score_from_norms mask_from_norms prune_from_norms_ topk_mask
    kth_largest Neighbor IDENTITY bn_scale info __version__ trace Topology TopologyError LapError
    prune scores sparsity PruneResult Masks Pruner uniform uniform_plus er erk one_shot linear cubic
    exponential iterative
"""
MODULES = """
    adapters allocation checkpoint criteria errors masks numpy ops options progress pruning report
    schedule structures topology
"""
DECIDING = {  # option -> its type, wherever a public function has it
    "scope": options.Scope,
    "normalize": options.Normalize,
    "order": options.Order,
    "batch_norm": options.BatchNorm,
    "residual": options.Residual,
    "on_unsupported": options.OnUnsupported,
    "aggregate": lap_ext.structures.Aggregate,
}


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_names() -> None:
    assert sorted(lap_ext.__all__) == sorted([*NAMES.split(), *MODULES.split()])
    for name in lap_ext.__all__:
        assert getattr(lap_ext, name) is not None
    assert set(lap_ext.__all__) <= set(dir(lap_ext))
    with pytest.raises(AttributeError, match=r"^module 'lap_ext' has no attribute 'nothing'$"):
        lap_ext.nothing  # noqa: B018 (the access is the test)
    for name in checkpoint.__all__:
        assert getattr(checkpoint, name) is not None
    assert set(checkpoint.__all__) <= set(dir(checkpoint))
    with pytest.raises(AttributeError, match=r"^module 'lap_ext.checkpoint' has no attribute 'no'"):
        checkpoint.no  # noqa: B018


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.parent.name)
def test_a_stub_is_one_table_of_single_names(stub: Path) -> None:
    """__init__.py reads it so; a line `import a, b` or `import a as b` would be half read."""
    for line in ast.parse(stub.read_text()).body:
        if isinstance(line, ast.ImportFrom):
            (name,) = line.names
            assert name.asname == name.name and line.level == 0, ast.unparse(line)
        else:
            assert ast.unparse(line) == "__version__: str"


def test_submodules_load_on_first_use() -> None:
    names = MODULES.split()
    code = f"import lap_ext; print(*(getattr(lap_ext, x).__name__ for x in {names}))"
    assert fresh(code).split() == [f"lap_ext.{name}" for name in names]


def test_the_readmes_own_line() -> None:
    assert fresh("import lap_ext; print(lap_ext.checkpoint.prune.__name__)") == "prune"


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, lap_ext{}; print([x for x in ('torch', 'numpy') if x in sys.modules])"
    assert fresh(code.format("")) == "[]"
    assert fresh(code.format(", lap_ext.numpy")) == "['numpy']"


def public_functions() -> list[tuple[str, Any]]:
    """Functions and methods with a boundary of their own, by their full names."""
    found = []
    for name in lap_ext.__all__:
        home = getattr(lap_ext, name)
        inner = [("", home)]
        if inspect.isclass(home):
            inner = [(x, getattr(home, x)) for x in vars(home) if x[0] != "_" or x == "__init__"]
        if inspect.ismodule(home) and name not in ("numpy", "options", "errors"):
            inner = [(x, getattr(home, x)) for x in getattr(home, "__all__", [])]
        found += [
            (f"{name}.{x}".rstrip("."), f) for x, f in inner if inspect.isroutine(inspect.unwrap(f))
        ]
    assert len(found) > 60
    return found


@pytest.mark.parametrize(
    ("name", "function"), public_functions(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_options_are_explicit_and_literal(name: str, function: Any) -> None:
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.kind is not parameter.VAR_KEYWORD, f"{name}(**{parameter.name})"
    annotations = inspect.unwrap(function).__annotations__
    for option, kind in DECIDING.items():
        if option in annotations:
            rooms = vars(options) | vars(lap_ext.structures)
            spelled = next(x for x, value in rooms.items() if value is kind)
            assert annotations[option] in (spelled, f"options.{spelled}"), f"{name}({option}=)"
            default = signature.parameters[option].default
            assert default is inspect.Parameter.empty or default in typing.get_args(kind)
            assert typing.get_origin(kind) is Literal


RENAMED = r"\b(bn|skip|unknown|kwargs|factors|\w+_from_factors|paper)="


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_old_name_is_left_in_a_docstring(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            text = ast.get_docstring(node) or ""
            assert not re.search(RENAMED, text), f"{path}: {getattr(node, 'name', 'module')}"


OWN = {
    "model",
    "sparsity",
    "masks",
    "apply",
}  # parameters of prune that a pruner or a callback has not


def shared_signatures() -> dict[str, Any]:
    """Callables that offer the options of prune, and those that they cannot offer."""
    from lap_ext.adapters import torch_prune
    from lap_ext.adapters._callback import TrainingCallback

    layered = {"scope", "order", "rounds", "min_keep"}  # how scores are ranked
    layered |= {"structure", "aggregate", "multiple_of", "strict", "cost", "uniform"}
    files = {"topology", "residual", "data", "neighbors"}  # see checkpoint.prune
    return {
        "scores": (lap_ext.scores, layered),
        "Pruner": (lap_ext.Pruner.__init__, set()),
        "checkpoint.prune": (lap_ext.checkpoint.prune, files),
        "checkpoint.scores": (lap_ext.checkpoint.scores, files | layered),
        "TrainingCallback": (TrainingCallback.__init__, set()),
        "torch_prune.scores": (torch_prune.scores, layered),
    }


@pytest.mark.parametrize("name", list(shared_signatures()))
def test_shared_options_are_the_same_everywhere(name: str) -> None:
    """The same name, default and type as in prune: what is spelled out cannot drift apart."""
    function, lacks = shared_signatures()[name]
    prune, mine = (
        inspect.signature(lap_ext.prune).parameters,
        inspect.signature(function).parameters,
    )
    for option, parameter in prune.items():
        if option in OWN | lacks or option == "example_inputs":
            continue
        assert option in mine, f"{name} lacks {option}="
        assert mine[option].default == parameter.default, option
        annotation = mine[option].annotation.replace("lap_ext.Topology", "Topology")
        assert annotation == parameter.annotation, option
