# SPDX-License-Identifier: MIT
"""The house rules, read from the sources: who may import and include whom, and how long files are.

C++     bind -> cpu, cuda -> math; cpu and cuda never see each other; only bind sees torch, pybind11.
Python  arrows never point up and there are no circles; only ops.py spells torch.ops.lap_ext.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, CSRC = ROOT / "lap_ext", ROOT / "csrc"
MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu", ".inc"})
MAX_LINES = 400

# What each room may include. bind/ is one room, but its three libraries stay apart below.
ROOMS = {
    "math": {"math"},
    "cpu": {"cpu", "math"},
    "cuda": {"cuda", "math"},
    "bind": {"bind", "cpu", "cuda", "math"},
}

# Low to high. A module imports only from rooms below its own (or, __init__, by name on demand);
# within a package, which is one room, and everywhere else there are no circles.
LEVELS = [
    {"check", "progress"},
    {"neighbors", "select_reference", "native", "mask_file"},
    {"reference", "allocation", "schedule", "mask_targets"},
    {"ops", "arrays", "mask_keep"},
    {"tensors", "masks"},
    {"api", "from_factors", "ranking", "numpy"},
    {"topology"},
    {"report"},
    {"network", "result", "measure"},
    {"criteria"},
    {"selection"},
    {"pruning"},
    {"pruner", "checkpoint"},
    {"adapters"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
TORCH_FREE = ["__init__", "check", "neighbors", "arrays", "numpy"]


def imports(path: Path) -> dict[str, bool]:
    """Imported module -> whether at run time (False: for the type checker only)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [base]
            if base.startswith("lap_ext"):  # a name of the package may be a module itself
                inner = [f"{base}.{alias.name}" for alias in node.names]
                modules = [name for name in inner if (ROOT / name.replace(".", "/")).exists()
                           or (ROOT / f"{name.replace('.', '/')}.py").exists()]  # fmt: skip
                names = modules + ([base] if len(modules) < len(inner) else [])
        for name in names:
            found[name] = found.get(name, False) or id(node) not in typing_only
    return found


def inner_imports(path: Path) -> set[str]:
    """Modules of the package imported at run time; lap_ext.__version__ is none."""
    found = {name for name, real in imports(path).items() if real and name.startswith("lap_ext.")}
    known = {module_name(path) for path in MODULES}
    found = {name.removeprefix("lap_ext.") for name in found}
    return {name for name in found if name in known and name != module_name(path)}


def module_name(path: Path) -> str:
    """ "topology.labels" of lap_ext/topology/labels.py, "topology" of its __init__, "" of lap_ext."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def binding_includes(stem: str) -> set[str]:
    """What a binding includes, also through the headers beside it."""
    found, left = set(), [f"{stem}.cpp"]
    while left:
        names = set(includes(CSRC / "bind" / left.pop())) - found
        found |= names
        left += [name for name in names if (CSRC / "bind" / name).parent == CSRC / "bind"
                 and (CSRC / "bind" / name).exists()]  # fmt: skip
    return found


def level(name: str) -> int:
    room = name.partition(".")[0]
    return next((i for i, names in enumerate(LEVELS) if room in names), -1)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_python_arrows_point_down(path: Path) -> None:
    mine = module_name(path)
    if not mine:
        assert inner_imports(path) == set(), "__init__ imports on demand"
        return
    assert level(mine) >= 0, f"{path.name}: a new room needs a level in this test"
    for name in inner_imports(path):
        same_room = name.split(".")[0] == mine.split(".")[0]
        assert same_room or level(name) < level(mine), f"{path.name} imports {name}"


def test_no_circles() -> None:
    """An order of all modules exists in which each imports only from earlier ones."""
    left = {module_name(path): inner_imports(path) for path in MODULES if module_name(path)}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_free_modules(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    roots = {name.split(".")[0] for name, real in imports(path).items() if real}
    assert "torch" not in roots
    assert inner_imports(path) <= set(TORCH_FREE)


def test_no_foreign_packages() -> None:
    """The package needs torch and safetensors; other packages only where they are asked for."""
    import sys

    everywhere = {"torch", "numpy", "safetensors", "lap_ext", "__future__"}
    asked = {
        "measure": {"backpack"},
        "adapters": {
            "transformers",
            "lightning",
            "pytorch_lightning",
            "nncf",
            "torch_pruning",
            "llmcompressor",
            "compressed_tensors",
            "pydantic",
        },
        "checkpoint": {"transformers"},
        "report": {"matplotlib"},
        "cli": {"rich", "shtab"},
        "demo": {"matplotlib", "rich", "sklearn"},
    }
    for path in MODULES:
        roots = {name.split(".")[0] for name in imports(path)}
        allowed = everywhere | asked.get(module_name(path).partition(".")[0], set())
        assert roots <= allowed | set(sys.stdlib_module_names), path.name


def test_only_ops_spells_the_namespace() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        spelled = any(
            isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.lap_ext")
            for node in ast.walk(tree)
        )
        assert spelled == (path.stem == "ops"), path.name


def test_the_library_never_prints() -> None:
    for path in MODULES:
        if path.stem == "demo":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            assert called != "print", f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_rooms(path: Path) -> None:
    room = path.relative_to(CSRC).parts[0]
    for name in includes(path):
        foreign = name.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h"))
        assert not foreign or room == "bind", f"{path} includes {name}"
        cuda = name.startswith(("cuda", "cub/"))
        assert not cuda or room == "cuda" or path.stem == "torch_cuda" or "host_device" in name
        target = (path.parent / name).resolve()
        if target.exists():
            assert target.relative_to(CSRC).parts[0] in ROOMS[room], f"{path} includes {name}"


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


SOURCES = [
    *MODULES,
    *NATIVE,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.cpp")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_head_and_length(path: Path) -> None:
    lines = path.read_text().splitlines()
    if not lines:
        return
    assert "SPDX-License-Identifier: MIT" in lines[0], path
    assert len(lines) <= MAX_LINES, f"{path}: {len(lines)} lines"


def test_version_lives_in_one_place() -> None:
    version = re.search(r'__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text())
    assert version
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        assert f'"{version[1]}"' not in (ROOT / name).read_text(), name


def test_public_names() -> None:
    import lap_ext

    assert sorted(lap_ext.__all__) == sorted(
        "score mask prune_ factors score_from_factors mask_from_factors prune_from_factors_ "
        "topk_mask kth_largest Neighbor IDENTITY bn_scale info __version__ trace Topology "
        "TopologyError prune scores PruneResult Masks Pruner uniform uniform_plus er erk paper "
        "one_shot linear cubic exponential iterative".split()
    )
    for name in lap_ext.__all__:
        assert getattr(lap_ext, name) is not None
    assert set(lap_ext.__all__) <= set(dir(lap_ext))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lap_ext.nothing  # noqa: B018 (the access is the test)
