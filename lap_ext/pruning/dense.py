# SPDX-License-Identifier: MIT
"""Finds the layers that stay dense unless the user names them: embeddings and output heads.

Each of their rows stands for one token or position, so a pruned row harms that token wherever it
occurs; SparseGPT, Wanda and others leave them dense too.

    embedding     looked up by index, also where the same weight is used elsewhere (tied)
    output head   a linear layer without consumers, with as many outputs as an embedding has entries
"""

from __future__ import annotations

from collections.abc import Mapping

from lap_ext._text import some
from lap_ext.topology import Layer, Topology

EMBEDDING, TIED, HEAD, ZERO = "embedding", "tied to an embedding", "output head", "all zero"
_BY_DEFAULT = {EMBEDDING, TIED, HEAD, ZERO}
_LISTED = 5  # of many layers, a line lists the first ones


def dense_by_default(topology: Topology) -> dict[str, str]:
    """Maps the layers that stay dense by default to the reason.

    Example:
        >>> import torch, lap_ext
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tokens = torch.nn.Embedding(50, 8)
        ...         self.hidden = torch.nn.Linear(8, 8)
        ...         self.head = torch.nn.Linear(8, 50)
        ...     def forward(self, x):
        ...         return self.head(self.hidden(self.tokens(x)))
        >>> dense_by_default(lap_ext.trace(Model(), torch.ones(1, 3, dtype=torch.int64)))
        {'tokens': 'embedding', 'head': 'output head'}
    """
    reasons, entries = {}, set()
    for name, layer in topology.layers.items():
        kinds = {role.kind for role in layer.roles}
        if "embedding" in kinds:
            reasons[name] = EMBEDDING if len(kinds) == 1 else TIED
            entries |= {x.part.channels[0] for x in layer.roles if x.kind == "embedding"}
    for name, layer in topology.layers.items():
        if name not in reasons and _is_head(layer, entries):
            reasons[name] = HEAD
    return {name: reasons[name] for name in topology.layers if name in reasons}


def _is_head(layer: Layer, entries: set[int]) -> bool:
    """Tells whether a layer has one output per entry of an embedding, which no layer reads."""
    plain = all(x.kind == "linear" and x.part.channels[1] in entries for x in layer.roles)
    return plain and not any(edge.kind == "layer" for edge in layer.next)


def sentence(left_dense: Mapping[str, str]) -> str:
    """Says which layers were left dense, why, and how to include them; empty if there are none.

    Those that a structure does not fit cannot be included.

    Example:
        >>> sentence({"a": "embedding", "head": "output head"})
        "Left dense: 'a' (embedding), 'head' (output head). Name them with layers to prune them."
        >>> sentence({"conv1": "2:4: 4 does not divide its 3 inputs"})
        "The structure does not fit: 'conv1' (2:4: 4 does not divide its 3 inputs)."
    """
    by_default = [f"{x!r} ({why})" for x, why in left_dense.items() if why in _BY_DEFAULT]
    others = [f"{x!r} ({why})" for x, why in left_dense.items() if why not in _BY_DEFAULT]
    sentences = []
    if by_default:
        names = some(by_default, _LISTED)
        sentences.append(f"Left dense: {names}. Name them with layers to prune them.")
    if others:
        sentences.append(f"The structure does not fit: {some(others, _LISTED)}.")
    return " ".join(sentences)
