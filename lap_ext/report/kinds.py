# SPDX-License-Identifier: MIT
"""Tells pages and plots from other files by how they begin, so that only they are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lap_ext.report.page import BEGIN

PAGE = (BEGIN.encode(),)
PLOTS: Mapping[str, Sequence[bytes]] = {  # by suffix; a plot in another format is not recognized
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".pdf": (b"%PDF-",),
    ".svg": (b"<?xml", b"<svg"),
    ".jpg": (b"\xff\xd8\xff",),
}


def is_one(path: Path, begins: Sequence[bytes]) -> bool:
    """Tells whether a file begins in one of these ways, or is empty, or does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "plot.png"
        ...     new = is_one(path, PLOTS[".png"])
        ...     _ = path.write_text("a note")
        ...     new, is_one(path, PLOTS[".png"])
        (True, False)
    """
    if not path.exists():
        return True
    with path.open("rb") as file:
        start = file.read(max(map(len, begins), default=1))
    return not start or start.startswith(tuple(begins))
