# SPDX-License-Identifier: MIT
"""Lookahead pruning: exact scores and masks for the weights of a neural network.

    score[o, i, ...] = |w[o, i, ...]| * ||w_prev[i]||_F * ||w_next[:, o]||_F

Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020.
The public names are listed in __init__.pyi. Each is imported when it is first used, so that
lap_ext.numpy works without torch.
"""

import ast
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# A torch without NumPy says so when it is imported. Nothing here converts between the two.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def lazily(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """Makes the __getattr__ of a package whose names are imported when they are first used.

    Args:
        package: its name.
        file: its __init__.py; the __init__.pyi beside it is the table of its public names.

    Returns:
        The function, and the names.
    """
    table = ast.parse(Path(file).with_name("__init__.pyi").read_text("utf-8"))
    home = {  # public name -> the module that it is in; of a module: the package
        line.names[0].name: line.module or ""
        for line in table.body
        if isinstance(line, ast.ImportFrom)
    }

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if home[name] == package:
            return import_module(f"{package}.{name}")
        value = getattr(import_module(home[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, list(home)


__getattr__, _NAMES = lazily(__name__, __file__)
__all__ = ["__version__", *_NAMES]  # noqa: PLE0604 (the names are strings)


def __dir__() -> list[str]:
    return sorted(__all__)
