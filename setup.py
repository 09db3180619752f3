# SPDX-License-Identifier: MIT
"""Builds lap_ext's native libraries: runs CMake, which holds the only list of sources and flags.

LAP_EXT_BUILD  auto (default): native; pure PyTorch where cmake or a C++ compiler is missing or the
               machine is not x86-64 Linux: the wheel is then for every machine, and notes why, for
               lap_ext.info(). require: then an error. pure: never native.
               A tool that is there and fails is always an error.
LAP_EXT_CUDA   auto (default): CUDA kernels if a CUDA toolkit is found. 0: never. 1: must be found.
CUDA_HOME, CXX, CMAKE_ARGS, MAX_JOBS are honored.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent  # under PEP 517 __file__ is relative
# pip's cmake and ninja first
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def option(name: str, *allowed: str) -> str:
    """The value of an environment option; the first allowed one is the default."""
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        sys.exit(f"lap_ext: expected {name} to be one of {', '.join(allowed)}, got {value!r}.")
    return value


def why_pure() -> tuple[str, str] | None:
    """Why no native library is built, and the cure; None: it is built."""
    if option("LAP_EXT_BUILD", "auto", "require", "pure") == "pure":
        return "LAP_EXT_BUILD=pure was set", "Unset it and install again"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        here = f"this is {sys.platform} on {platform.machine()}"
        return f"it is for Linux on x86-64, {here}", "Install it on such a machine"
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name, path=PATH) for name in compilers):
        reason = f"no C++ compiler was found (looked for {', '.join(compilers)})"
        return reason, "Install one (gcc >= 12) and then lap_ext again"
    if not shutil.which("cmake", path=PATH):
        return "cmake was not found", "Run: pip install cmake ninja, and install lap_ext again"
    return None


def cuda_root() -> Path | None:
    """Finds the CUDA toolkit, with bin/nvcc and headers (an nvcc on PATH may be a wrapper)."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parents[1]] if nvcc else []
    places += [Path("/usr/local/cuda")]
    if os.environ.get("CUDA_HOME"):
        places = [Path(os.environ["CUDA_HOME"])]
    for root in places:
        if (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists():
            return root
    return None


def package_folder(name: str, cure: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"lap_ext: the native build needs {name}. {cure}")
    return Path(spec.origin).parent


def configure_options() -> list[str]:
    """CMake's -D options for this machine."""
    torch = package_folder("torch", "Install torch >= 2.11 first, or set LAP_EXT_BUILD=pure.")
    pybind11 = package_folder("pybind11", "Run: pip install pybind11")
    options = [f"-DLAP_TORCH_DIR={torch}", f"-DLAP_PYBIND_DIR={pybind11}/share/cmake/pybind11"]
    options += [f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}"]
    cuda = option("LAP_EXT_CUDA", "auto", "0", "1")
    root = cuda_root() if cuda != "0" else None
    if cuda == "1" and root is None:
        sys.exit("lap_ext: LAP_EXT_CUDA=1, but no CUDA toolkit was found. Set CUDA_HOME.")
    options += [f"-DLAP_CUDA={'ON' if root else 'OFF'}"]
    options += [f"-DCMAKE_CUDA_COMPILER={root}/bin/nvcc"] if root else []
    print(f"lap_ext: building with torch in {torch}, CUDA kernels: {root or 'no'}", flush=True)
    return options + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def why_no_cuda() -> tuple[str, str] | None:
    """Why no CUDA kernels are built, and the cure; None: they are."""
    if option("LAP_EXT_CUDA", "auto", "0", "1") == "0":
        return "LAP_EXT_CUDA=0 was set", "Unset it and install again"
    if cuda_root() is None:
        return "no CUDA toolkit was found", "Set CUDA_HOME and install again"
    return None


class Modules(build_py):
    """Copies the modules, and notes beside them which native libraries are not built, and why."""

    def run(self) -> None:
        """Runs before CMake; removes libraries and the note of an earlier, different build."""
        if PURE and os.environ.get("LAP_EXT_BUILD") == "require":
            sys.exit(f"lap_ext: LAP_EXT_BUILD=require, but {PURE[0]}. {PURE[1]}.")
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "lap_ext"
        note = package / "not_built.json"
        for stale in [*package.glob("_*.so"), *package.glob(note.name)]:
            stale.unlink()
        if PURE:
            text = "lap_ext: no native library, pure PyTorch (slower, same results)"
            print(f"{text}: {PURE[0]}.", file=sys.stderr)
        missing = {"_C.abi3.so": PURE, "_np": PURE, "_C_cuda.abi3.so": PURE or why_no_cuda()}
        if missing := {file: why for file, why in missing.items() if why}:
            note.write_text(json.dumps(missing), encoding="utf-8")


class CMakeBuild(build_ext):
    """Configures, builds and installs the native libraries into the package folder."""

    def run(self) -> None:
        """Runs CMake."""
        inplace = self.inplace or self.editable_mode
        self.run_cmake((ROOT if inplace else Path(self.build_lib).resolve()) / "lap_ext")

    def run_cmake(self, package: Path) -> None:
        """Three calls; a build folder per configuration: rebuilds are short and never stale."""
        env = {**os.environ, "PATH": PATH}
        cmake = [shutil.which("cmake", path=PATH)]
        options = configure_options()
        if shutil.which("ninja", path=PATH):
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=PATH)}"]
        key = hashlib.sha256(repr((cmake, options, os.environ.get("CXX"))).encode()).hexdigest()[:8]
        build = ROOT / "build" / f"native-{key}"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for step in (
            ["-S", str(ROOT), "-B", str(build), *options],
            ["--build", str(build), "--parallel", jobs],
            ["--install", str(build), "--prefix", str(package)],
        ):
            if subprocess.run(cmake + step, check=False, env=env).returncode != 0:
                cure = "LAP_EXT_CUDA=0 builds without CUDA, LAP_EXT_BUILD=pure without a compiler"
                sys.exit(f"lap_ext: the native build failed, see above. {cure}.")

    def get_outputs(self) -> list[str]:
        """Nothing for setuptools to copy: CMake installs."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """See get_outputs."""
        return {}


PURE = why_pure()
# The extension without sources only makes the wheel platform-specific; the rest: pyproject.toml.
setup(
    ext_modules=[] if PURE else [Extension("lap_ext._C", [])],
    cmdclass={"build_py": Modules, "build_ext": CMakeBuild},
)
