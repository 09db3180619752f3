# SPDX-License-Identifier: MIT
"""Offers lookahead pruning in other libraries, with one module per framework, loaded when used.

    lap_ext.adapters.torch_prune     torch.nn.utils.prune: a pruning method, exact global masks
    lap_ext.adapters.torch_ao        torch.ao.pruning: a sparsifier, with torch's schedulers
    lap_ext.adapters.transformers    transformers: a callback of Trainer
    lap_ext.adapters.lightning       lightning: a callback of Trainer
    lap_ext.adapters.llmcompressor   llm-compressor: a modifier for oneshot
    lap_ext.adapters.torch_pruning   Torch-Pruning: an importance for groups of channels
    lap_ext.adapters.nncf            nncf: lap_ext's masks in nncf's models, which export uses

Nothing else in lap_ext imports these modules, and they use only what lap_ext exports. _callback.py
holds what the two callbacks share. If a framework is not installed, its adapter raises a
ModuleNotFoundError that says what to install.

    >>> import lap_ext
    >>> lap_ext.adapters.torch_prune.LookaheadUnstructured(0.5).amount
    0.5
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    module = f"{__name__}.{name}"
    if name.startswith("_") or find_spec(module) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(module)
