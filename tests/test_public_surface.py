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
from lap_ext import options

SOURCES = sorted(Path(lap_ext.__file__).parent.rglob("*.py"))
STUB = Path(lap_ext.__file__).with_name("__init__.pyi")
NAMES = """
    score mask prune_ neighbor_norms score_from_norms mask_from_norms prune_from_norms_ topk_mask
    kth_largest Neighbor IDENTITY bn_scale info __version__ trace Topology TopologyError LapError
    prune scores sparsity PruneResult Masks Pruner uniform uniform_plus er erk one_shot linear cubic
    exponential iterative
"""
MODULES = """
    adapters allocation checkpoint criteria errors masks numpy ops options progress pruning report
    schedule topology
"""
DECIDING = {  # option -> its type, wherever a public function has it
    "scope": options.Scope,
    "normalize": options.Normalize,
    "order": options.Order,
    "batch_norm": options.BatchNorm,
    "residual": options.Residual,
    "on_unsupported": options.OnUnsupported,
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


def test_the_stub_is_one_table_of_single_names() -> None:
    """__init__.py reads it so; a line `import a, b` or `import a as b` would be half read."""
    for line in ast.parse(STUB.read_text()).body:
        if isinstance(line, ast.ImportFrom):
            (name,) = line.names
            assert name.asname == name.name and line.level == 0, ast.unparse(line)
        else:
            assert ast.unparse(line) == "__version__: str"


@pytest.mark.parametrize("name", MODULES.split())
def test_submodules_load_on_first_use(name: str) -> None:
    assert fresh(f"import lap_ext; print(lap_ext.{name}.__name__)") == f"lap_ext.{name}"


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
            spelled = next(x for x in vars(options) if getattr(options, x) is kind)
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
