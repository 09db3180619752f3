# SPDX-License-Identifier: MIT
"""Says why a native library is missing: setup.py notes it in the package that it builds without."""

from __future__ import annotations

import json
from pathlib import Path

NOTE = "not_built.json"  # file -> [reason, cure]
_AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir, as lap_ext was installed before"
REINSTALL = f"Install it again: {_AGAIN}."


def why(file: str, package: Path) -> tuple[str, str]:
    """Returns why a file of the package is missing, and the cure, both as sentences.

    Example:
        >>> why("_C.abi3.so", Path("nowhere"))[0]
        '_C.abi3.so is not in nowhere, though lap_ext was built with it.'
    """
    note = package / NOTE
    known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if file in known:
        reason, cure = known[file]
        return f"It was built without: {reason}.", f"{cure}: {_AGAIN}."
    reason = f"{file} is not in {package}, though lap_ext was built with it."
    return reason, REINSTALL
