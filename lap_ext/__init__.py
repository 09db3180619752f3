# SPDX-License-Identifier: MIT
"""Lookahead pruning: exact scores and masks for the weights of a neural network.

    score[o, i, ...] = |w[o, i, ...]| * ||w_prev[i]||_F * ||w_next[:, o]||_F

Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020.
The public names are listed in __init__.pyi. Each is imported when it is first used, so that
lap_ext.numpy works without torch.
"""

import ast
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# A torch without NumPy says so when it is imported. Nothing here converts between the two.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

_TABLE = ast.parse(Path(__file__).with_name("__init__.pyi").read_text("utf-8"))
_HOME = {  # public name -> the module that it is in; of a module: this package
    line.names[0].name: line.module or ""
    for line in _TABLE.body
    if isinstance(line, ast.ImportFrom)
}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (the keys are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] == __name__:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
