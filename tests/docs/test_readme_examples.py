# SPDX-License-Identifier: MIT
"""Every ```python block of the README runs, top to bottom, in one namespace.

A block may assert; one with >>> prompts runs as a doctest. Docstrings of the package run with
pytest's own --doctest-modules (pyproject.toml).
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(path: Path) -> list[tuple[int, str]]:
    """(line number, code) of each Python block."""
    text = path.read_text()
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in BLOCK.finditer(text)]


def execute(path: Path, line: int, code: str, names: dict[str, Any]) -> None:
    """Runs a block; a failure names the file and line."""
    if ">>>" not in code:
        # Blank lines first, so that a traceback shows the line of the file.
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, names, path.name, str(path), line - 1)
    runner = doctest.DebugRunner(optionflags=FLAGS)
    runner.run(test, clear_globs=False)
    names.update(test.globs)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = ROOT / "README.md"
    found = blocks(readme)  # a missing README is a failure, not a skip
    assert found, "README.md shows no Python"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for line, code in found:
        execute(readme, line, code, names)


def test_every_public_function_has_an_example() -> None:
    import lap_ext

    for name in lap_ext.__all__:
        thing = getattr(lap_ext, name)
        if callable(thing):
            assert ">>> " in (thing.__doc__ or ""), name


def test_the_runner_fails_when_a_block_does() -> None:
    """The runner itself can fail: a wrong assert and a wrong doctest are seen."""
    here = Path(__file__)
    with pytest.raises(AssertionError):
        execute(here, 1, "assert 1 == 2\n", {})
    with pytest.raises(doctest.DocTestFailure):
        execute(here, 1, ">>> 1 + 1\n3\n", {})
