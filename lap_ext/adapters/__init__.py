# SPDX-License-Identifier: MIT
"""Lookahead pruning inside other libraries: one file per host, imported by its name only.

    lap_ext.adapters.torch_prune     torch.nn.utils.prune: a pruning method, exact global masks
    lap_ext.adapters.torch_ao        torch.ao.pruning: a sparsifier, with torch's schedulers
    lap_ext.adapters.transformers    transformers: a callback of Trainer

Nothing of lap_ext imports them, and they use what lap_ext exports, no more.
"""
