# SPDX-License-Identifier: MIT
"""Writes how to use a pruned directory, as lines of Python for a report."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from lap_ext.checkpoint.files import MASKS, SINGLE


def loading(directory: Path, model: nn.Module | None = None) -> list[str]:
    """Writes how to load the weights and masks of a directory.

    Args:
        directory: a result of a pruning.
        model: the model of a directory that a library of models can load; None means that the
            user's own code makes it.

    Example:
        >>> for line in loading(Path("out")):
        ...     print(line)
        from safetensors.torch import load_model
        load_model(model, 'out/model.safetensors')  # model: made by your code
        import lap_ext
        masks = lap_ext.Masks.load('out/lap_ext_masks.safetensors', model)
    """
    name, path = type(model).__name__, repr(os.fspath(directory))
    if type(model).__module__.startswith("transformers."):
        lines = [f"from transformers import {name}", f"model = {name}.from_pretrained({path})"]
    else:
        file = repr(os.fspath(directory / SINGLE))
        lines = ["from safetensors.torch import load_model"]
        lines += [f"load_model(model, {file})  # model: made by your code"]
    masks = repr(os.fspath(directory / MASKS))
    return [*lines, "import lap_ext", f"masks = lap_ext.Masks.load({masks}, model)"]
