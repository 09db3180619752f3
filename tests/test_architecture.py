# SPDX-License-Identifier: MIT
"""The house rules, read from the sources: who may import and include whom.

C++     bind -> cpu, cuda -> math; cpu and cuda never see each other; bind alone sees torch.
Python  rooms stand on floors, imports point down only, and there are no circles, not even among
        imports for the type checker. No room takes another's _private names.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, CSRC, TESTS = ROOT / "lap_ext", ROOT / "csrc", ROOT / "tests"
MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu", ".inc"})

# What each C++ room may include. bind/ is one room, but its three libraries stay apart below.
CPP_ROOMS = {
    "math": {"math"},
    "cpu": {"cpu", "math"},
    "cuda": {"cuda", "math"},
    "bind": {"bind", "cpu", "cuda", "math"},
}

# From the ground up. A room (a package or module directly below lap_ext) imports only from rooms
# on floors below its own; "" is lap_ext itself, which loads its names on demand.
FLOORS = [
    {"_text"},
    {"errors"},
    {"options", "structures"},
    {"_files", "computed", "ops", "progress"},
    {"allocation", "masks", "numpy", "report", "schedule", "topology"},
    {"places"},
    {"criteria"},
    {"pruning"},
    {""},
    {"adapters", "checkpoint", "demo"},
    {"cli"},
    {"__main__"},
]
MOST_LOOSE_MODULES = 10
MOST_FLOORS = 12
SCREEN = 60  # lines

TORCH_FREE = [
    *("", "_files", "_text", "errors", "numpy", "options", "progress", "structures"),
    *("allocation", "allocation.budget", "allocation.layerwise", "allocation.notation"),
    "allocation.targets",
    *("cli.output", "cli.parser"),
    *("ops", "ops.check", "ops.missing", "ops.neighbors", "ops.numpy_args"),
    *("structures.base", "structures.coupled", "structures.matrix"),
]

EVERYWHERE = {"torch", "numpy", "safetensors", "lap_ext"}
FOREIGN = {  # packages that only these rooms ask for
    "adapters": {
        "compressed_tensors",
        "lightning",
        "llmcompressor",
        "nncf",
        "pydantic",
        "pytorch_lightning",
        "torch_pruning",
        "transformers",
    },
    "checkpoint": {"transformers"},
    "cli": {"rich", "shtab"},
    "criteria": {"backpack"},
    "demo": {"matplotlib", "rich", "sklearn"},
    "report": {"matplotlib"},
}


# --- Python ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One name that a module takes from another; name "": the module itself."""

    module: str
    name: str
    typing_only: bool


def module_name(path: Path) -> str:
    """ "masks.file" of lap_ext/masks/file.py, "masks" of its __init__, "" of lap_ext."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}
ROOMS = {name.partition(".")[0] for name in NAMES}
PUBLIC_ROOMS = {name for name in ROOMS if not name.startswith("_")}


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), -1)


def statements(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(module, name, typing only) of each name that a file imports, modules by their full names."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", id(node) in guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.module or "", x.name, id(node) in guarded) for x in node.names)


def imports(path: Path) -> set[Import]:
    """What a module takes from other modules of the package."""
    found = set()
    for module, name, typing_only in statements(path):
        if module != "lap_ext" and not module.startswith("lap_ext."):
            continue
        if (module, name) == ("lap_ext", "_np"):  # the native library beside the modules
            continue
        inner = module.removeprefix("lap_ext").removeprefix(".")
        longer = f"{inner}.{name}".strip(".")
        taken = Import(longer, "", typing_only) if longer in NAMES else None
        taken = taken or Import(inner, name, typing_only)
        if taken.module != module_name(path):
            found.add(taken)
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    mine = module_name(path)
    assert floor(mine) >= 0, f"{path.name}: a new room needs a floor in this test"
    for taken in imports(path):
        if taken == Import("", "__version__", typing_only=False):
            continue
        same = room(taken.module) == room(mine)
        assert same or floor(taken.module) < floor(mine), f"{mine} imports {taken.module}"


def test_no_circles() -> None:
    """An order of all modules exists in which each imports only from earlier ones."""
    needs = {}
    for path in MODULES:
        mine = module_name(path)
        needs[mine] = {
            x.module
            for x in imports(path)
            if x.module in NAMES and not (x.module == "" and x.name == "__version__")
        }
    while needs:
        free = {name for name, of in needs.items() if not of & set(needs)}
        assert free, f"circle among {sorted(needs)}"
        needs = {name: of for name, of in needs.items() if name not in free}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_room_takes_private_names_of_another(path: Path) -> None:
    mine, tree = module_name(path), ast.parse(path.read_text())
    modules = {}  # name in this file -> module of another room
    for taken in imports(path):
        if room(taken.module) == room(mine):
            continue
        private = taken.name.startswith("_") and taken.name != "__version__"
        private |= any(part.startswith("_") for part in taken.module.split(".")[1:])
        assert not private, f"{mine} takes {taken.module}.{taken.name}"
        if not taken.name:
            modules[taken.module.rpartition(".")[2]] = taken.module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of = ast.unparse(node.value)
            known = of in modules or of.startswith("lap_ext.")
            assert not known or node.attr.startswith("__"), (
                f"{path}:{node.lineno}: {of}.{node.attr}"
            )


def test_rooms_and_loose_modules() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py")]
    assert len(loose) <= MOST_LOOSE_MODULES, loose
    assert set().union(*FLOORS) == ROOMS, "a floor names a room that is not there"
    assert len(FLOORS) <= MOST_FLOORS


def test_tensors_and_models_meet_in_one_place() -> None:
    """ops knows no model, topology no kernel; of the criteria context.py and exact.py join both."""
    for path in MODULES:
        mine = module_name(path)
        of = {taken.module for taken in imports(path)}
        if room(mine) == "topology":
            free = {"ops.memory", "ops.reference.common"}  # which tensors are one; the exact root
            assert {x for x in of if room(x) == "ops"} <= free, mine
        if room(mine) == "criteria" and mine not in {"criteria.context", "criteria.exact"}:
            free = {"ops.check", "ops.reference.common"}  # argument checks, dtypes, the root
            assert {x for x in of if room(x) == "ops"} <= free, mine


def test_reports_see_dataclasses_only() -> None:
    for path in MODULES:
        if room(module_name(path)) == "report":
            rooms = {room(taken.module) for taken in imports(path)}
            assert rooms <= {"report", "_files", "_text", "errors"}, module_name(path)


def test_adapters_see_the_public_package_only() -> None:
    """lap_ext itself, a room as a whole, or each other."""
    for path in MODULES:
        if room(module_name(path)) == "adapters":
            for taken in imports(path):
                inside = room(taken.module) == "adapters"
                assert inside or taken.module in PUBLIC_ROOMS, (
                    f"{module_name(path)}: {taken.module}"
                )


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_free_modules(name: str) -> None:
    path = next(path for path in MODULES if module_name(path) == name)
    roots = {module.split(".")[0] for module, _, typing_only in statements(path) if not typing_only}
    assert "torch" not in roots
    assert {x.module for x in imports(path) if not x.typing_only} <= set(TORCH_FREE)


def test_no_foreign_packages() -> None:
    """The package needs torch and safetensors; other packages only where they are asked for."""
    for path in MODULES:
        roots = {module.split(".")[0] for module, _, _ in statements(path)}
        allowed = EVERYWHERE | FOREIGN.get(room(module_name(path)), set())
        assert roots <= allowed | set(sys.stdlib_module_names), path.name


def test_only_one_module_spells_the_namespace() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        spelled = any(
            isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.lap_ext")
            for node in ast.walk(tree)
        )
        assert spelled == (module_name(path) == "ops.schema"), path.name


def test_only_one_module_takes_roots_of_tensors() -> None:
    """torch.sqrt on a CPU may be one ulp off, so all take exact_sqrt: the same bits everywhere."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            root = isinstance(node, ast.Attribute) and re.fullmatch("r?sqrt_?", node.attr)
            root = root and ast.unparse(node.value) not in ("math", "np")  # type: ignore[attr-defined]
            power = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
            power = power and ast.unparse(node.right) in ("0.5", "-0.5")  # type: ignore[attr-defined]
            if root or power:
                found.add(module_name(path))
    assert found == {"ops.reference.common"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    """Its body without the docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= SCREEN, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_the_library_never_prints() -> None:
    for path in MODULES:
        if path.stem == "demo":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            assert called != "print", f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]


# --- C++ ------------------------------------------------------------------------------------------


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def binding_includes(stem: str) -> set[str]:
    """What a binding includes, also through the headers beside it."""
    found: set[str] = set()
    left = [f"{stem}.cpp"]
    while left:
        names = set(includes(CSRC / "bind" / left.pop())) - found
        found |= names
        left += [name for name in names if "/" not in name and (CSRC / "bind" / name).exists()]
    return found


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_rooms(path: Path) -> None:
    mine = path.relative_to(CSRC).parts[0]
    for name in includes(path):
        foreign = name.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h"))
        assert not foreign or mine == "bind", f"{path} includes {name}"
        cuda = name.startswith(("cuda", "cub/"))
        assert not cuda or mine == "cuda" or path.stem == "torch_cuda" or "host_device" in name
        target = (path.parent / name).resolve()
        if target.exists():
            assert target.relative_to(CSRC).parts[0] in CPP_ROOMS[mine], f"{path} includes {name}"


def test_bindings_stay_apart() -> None:
    """The CPU and NumPy libraries need no CUDA, the torch ones no pybind11."""
    for stem, barred in (
        ("torch_cpu", ("../cuda/", "pybind11/", "cuda")),
        ("numpy", ("../cuda/", "torch/", "cuda")),
        ("torch_cuda", ("../cpu/", "pybind11/")),
    ):
        for name in binding_includes(stem):
            assert not name.startswith(barred), f"{stem}.cpp includes {name}"


def test_every_include_exists() -> None:
    """A quoted path names a file of the tree: nothing is found by luck of a search path."""
    for path in NATIVE:
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            # launch.h reads an emulator in place of the CUDA runtime where the tests ask for it.
            folders = (path.parent, ROOT / "tests" / "cpp")
            assert any((folder / name).exists() for folder in folders), f"{path} includes {name}"


# --- tests and files ------------------------------------------------------------------------------

TEST_FILES = sorted(TESTS.rglob("*.py"))
OTHER_TESTS = {"benchmarks", "cpp", "docs", "helpers", "typing", "zoo"}  # no room's
SOURCES = [
    *MODULES,
    *NATIVE,
    *TEST_FILES,
    *sorted(TESTS.rglob("*.cpp")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]


def test_tests_mirror_the_rooms() -> None:
    found = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert found - OTHER_TESTS <= ROOMS
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= found, "each room has its tests"


def test_no_test_imports_a_test() -> None:
    for path in TEST_FILES:
        for module, name, _ in statements(path):
            parts = [*module.split("."), name]
            assert not any(part.startswith("test_") for part in parts), f"{path}: {module}.{name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_licence_in_the_first_line(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert not lines or "SPDX-License-Identifier: MIT" in lines[0], path


def test_version_lives_in_one_place() -> None:
    version = re.search(r'__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text())
    assert version
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        assert f'"{version[1]}"' not in (ROOT / name).read_text(), name


def test_no_function_takes_the_name_of_another() -> None:
    """An error learns who was called on its way out: lap_ext/errors.py."""
    for path in MODULES:
        if path.stem == "errors":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                named = [x for x in arguments if x.arg == "function" and x.annotation is not None]
                texts = [x for x in named if ast.unparse(x.annotation) == "str"]  # type: ignore[arg-type]
                assert not texts, f"{path}:{node.lineno}: {node.name}"


MISTAKES = {"ValueError", "TypeError", "RuntimeError", "OSError", "ModuleNotFoundError"}
CAUGHT = {  # raised and caught within one module, or with what the system said
    "checkpoint.files",
    "checkpoint.record",
    "checkpoint.state",
    "cli.bench",
    "cli.output",
}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_errors_are_made_of_parts(path: Path) -> None:
    if module_name(path) in CAUGHT:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = ast.unparse(node.exc.func)
            assert kind not in MISTAKES, f"{path}:{node.lineno}: {kind}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_text_of_our_own_is_parsed(path: Path) -> None:
    """Texts of foreign errors may be cut to a line; nothing looks for the words of ours."""
    source = path.read_text()
    assert not re.search(r"(match|search|sub|partition|replace)\([^)]*expected", source), path
