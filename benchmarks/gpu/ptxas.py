# SPDX-License-Identifier: MIT
"""Registers, shared memory and spills of every CUDA kernel, as ptxas -v reports them.

CMake says which files there are and with which flags they are compiled (no second list here); each
is compiled once more with -Xptxas=-v into build/ptxas. A report is kept beside a hash of all that
it depends on, so that a repeated run costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT

DIRECTORY = ROOT / "build" / "ptxas"  # ignored by git
ALL = (
    "80-real",
    "90-real",
    "100-real",
)  # what CMakeLists.txt builds; older toolkits: the first two
_REGISTERS_OF_A_PROCESSOR = 65536
_THREADS_OF_A_PROCESSOR = 2048

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; bytes are those of a thread, shared ones of a block."""

    name: str  # mangled, until named() has been there
    arch: str  # "sm_90"
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int  # stores and loads, those of the functions it calls included

    def resident(self, threads: int = 256) -> int:
        """Counts the blocks that a processor holds by registers (allocated by eights)."""
        taken = -(-self.registers // 8) * 8 * threads
        return min(_REGISTERS_OF_A_PROCESSOR // taken, _THREADS_OF_A_PROCESSOR // threads)


def parse(text: str) -> list[Kernel]:
    """Reads the kernels of a report of ptxas -v; skips other lines.

    ptxas lists a kernel's own properties first, then its registers, then the properties of
    functions that it calls.
    """
    found: list[Kernel] = []
    entry, arch, function = "", "", ""
    stack = {"": (0, 0)}
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            entry, arch, function, stack = match[1], match[2], match[1], {}
        elif match := _PROPERTIES.search(line):
            function = match[1]
        elif match := _STACK.search(line):
            stack[function] = int(match[1]), int(match[2]) + int(match[3])
            if found and entry and function != entry and found[-1].name == entry:
                found[-1] = _with_callee(found[-1], *stack[function])
        elif (match := _USED.search(line)) and entry:
            shared = _SHARED.search(line)
            own = stack.get(entry, (0, 0))
            found.append(Kernel(entry, arch, int(match[1]), int(shared[1]) if shared else 0, *own))
    return found


def _with_callee(kernel: Kernel, stack: int, spill: int) -> Kernel:
    return Kernel(
        kernel.name,
        kernel.arch,
        kernel.registers,
        kernel.shared_bytes,
        kernel.stack_bytes + stack,
        kernel.spill_bytes + spill,
    )


def spilling(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Selects those that move registers to memory, or keep an array there."""
    return [kernel for kernel in kernels if kernel.spill_bytes or kernel.stack_bytes]


def named(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Makes names readable and sorts; names stay where there is no c++filt."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    names = [kernel.name for kernel in kernels]
    if tool and names:
        done = subprocess.run(
            [tool], input="\n".join(names), check=True, capture_output=True, text=True
        )
        names = [short(name) for name in done.stdout.splitlines()]
    renamed = [
        Kernel(name, k.arch, k.registers, k.shared_bytes, k.stack_bytes, k.spill_bytes)
        for name, k in zip(names, kernels, strict=True)
    ]
    return sorted(renamed, key=lambda kernel: (kernel.name, int(re.sub(r"\D", "", kernel.arch))))


def short(name: str) -> str:
    """Shortens a demangled kernel: no namespaces, return type and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("lap::cuda::", "")
    name = name.replace("lap::", "").removeprefix("void ")
    name = name.partition("(")[0].replace("> >", ">>")
    return name.replace("BFloat16", "bfloat16").replace("Half", "float16")


# --- compiling ------------------------------------------------------------------------------------


def toolkit() -> Path | None:
    """Finds the CUDA toolkit's directory (an nvcc on the path may be a wrapper without headers)."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parents[1]] if nvcc else []
    places.append(Path("/usr/local/cuda"))
    if os.environ.get("CUDA_HOME"):
        places = [Path(os.environ["CUDA_HOME"])]
    for root in places:
        if (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists():
            return root
    return None


def version(root: Path) -> str:
    """Reads the toolkit's version from nvcc: "13.0.88"."""
    done = subprocess.run(
        [str(root / "bin/nvcc"), "--version"], check=True, capture_output=True, text=True
    )
    match = re.search(r"\bV(\d+(?:\.\d+)+)", done.stdout)
    return match[1] if match else "unknown"


def architectures(toolkit_version: str) -> tuple[str, ...]:
    """Returns those of a build for all: sm_100 is known from CUDA 12.8 on."""
    major, minor = (int(part) for part in toolkit_version.split(".")[:2])
    return ALL if (major, minor) >= (12, 8) else ALL[:2]


def tool(name: str) -> str:
    """Finds a program beside this Python (pip's cmake and ninja), else on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def commands(root: Path, archs: Sequence[str]) -> dict[str, list[str]]:
    """CMake's compile command of every .cu file, by its stem; configures in build/ptxas."""
    directory = DIRECTORY / "-".join(archs)
    ninja = shutil.which(tool("ninja"))
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    options = [
        "-DLAP_CUDA=ON",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DCMAKE_CUDA_COMPILER={root}/bin/nvcc",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}",
    ]
    subprocess.run(
        [tool("cmake"), "-S", str(ROOT), "-B", str(directory), *generator, *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = {}
    for entry in json.loads((directory / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if source.suffix == ".cu":
            found[source.stem] = shlex.split(entry["command"])
    return found


def reporting(command: Sequence[str], log: Path) -> list[str]:
    """Changes a compile command to report instead of building, in one thread: no lines mix."""
    changed = ["--threads=1" if part.startswith("--threads") else part for part in command]
    at = changed.index("-o")
    changed[at + 1] = str(log.with_suffix(".o"))
    return [*changed, "-Xptxas=-v"]


def sources() -> list[Path]:
    """Lists the files that a kernel's machine code depends on."""
    directories = (ROOT / "csrc" / "cuda", ROOT / "csrc" / "math")
    return sorted(
        path for directory in directories for path in directory.iterdir() if path.is_file()
    )


def digest(parts: Iterable[str]) -> str:
    """Hashes texts, twelve characters."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode())
        found.update(b"\0")
    return found.hexdigest()[:12]


def sources_digest() -> str:
    """Hashes what the report belongs to."""
    return digest(f"{path.name}\n{path.read_text()}" for path in sources())


def report(root: Path, archs: Sequence[str], jobs: int) -> list[Kernel]:
    """Compiles what has changed and parses all reports."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    state = sources_digest() + version(root)

    def one(stem: str, command: Sequence[str]) -> list[Kernel]:
        log = DIRECTORY / f"{stem}.{digest([state, *command])}.log"
        if not log.exists():
            done = subprocess.run(
                reporting(command, log), cwd=ROOT, capture_output=True, text=True, check=False
            )
            log.with_suffix(".o").unlink(missing_ok=True)
            if done.returncode != 0:
                raise RuntimeError(f"{stem}.cu does not compile:\n{done.stderr[-2000:]}")
            log.write_text(done.stdout + done.stderr)
        return parse(log.read_text())

    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda item: one(*item), commands(root, archs).items()))
    return named([kernel for part in parts for kernel in part])
