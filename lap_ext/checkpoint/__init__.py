# SPDX-License-Identifier: MIT
"""Checkpoints larger than memory: directories of safetensors, read in chunks.

The names are listed in __init__.pyi. Each is imported when it is first used: `verify` needs no
trace.
"""

from lap_ext import lazily

__getattr__, __all__ = lazily(__name__, __file__)


def __dir__() -> list[str]:
    return sorted(__all__)
