# SPDX-License-Identifier: MIT
"""Builds what a machine with a GPU needs, on one without: python -m benchmarks.gpu.prepare.

The libraries in place, the driver and cub's baseline, for one architecture. There, without a
network or a compiler: python -m benchmarks.gpu --prebuilt. Prints what to take along.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu import build, cub, driver, ptxas
from benchmarks.gpu.steps import TAIL, NotRunError, read, run_command
from benchmarks.report import write_json

NOTE = driver.TARGET.with_name("prepared.json")  # what was built, and from what
LIMIT_S = 3600.0


def libraries(arch: str) -> list[Path]:
    """Builds lap_ext/_C*.so."""
    command, env = build.plan(arch)
    code, output = run_command(command, LIMIT_S, env)
    if code != 0:
        raise RuntimeError(f"the build failed ({code}):\n{output[-TAIL:]}")
    return sorted((machine.ROOT / "lap_ext").glob("_C*.so"))


def prepare(arch: str) -> list[Path]:
    """Builds everything; the baseline is left out where the toolkit has no cub."""
    found = [*libraries(arch), driver.build(arch)]
    try:
        found.append(cub.compiled(arch))
    except NotRunError as error:
        print(f"without cub's baseline: {error}", file=sys.stderr)
    write_json(NOTE, note(arch))
    return [*found, NOTE]


def note(arch: str) -> dict[str, Any]:
    """Says what the built files belong to."""
    return {
        "architecture": arch,
        "commit": machine.commit(),
        "sources": ptxas.sources_digest(),
    }


def prepared() -> dict[str, Any] | None:
    """Reads the note beside the built files, and whether sources changed; None without one."""
    found = read(NOTE)
    if not found:
        return None
    return {**found, "current": found["sources"] == ptxas.sources_digest()}


def listed(paths: Sequence[Path]) -> str:
    """Lists what to take along, with sizes, and the commit."""
    rows = [
        f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(machine.ROOT)}" for path in paths
    ]
    total = sum(path.stat().st_size for path in paths) / 1e6
    return "\n".join([*rows, f"{total:7.2f} MB  in all", f"commit {machine.commit()}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Builds and lists."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prepare", description=__doc__)
    parser.add_argument(
        "--arch", default="90-real", help="as CMake names it (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        paths = prepare(args.arch)
    except NotRunError as error:
        parser.error(str(error))
    print("take along, beside the files of the repository:")
    print(listed(paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
