# SPDX-License-Identifier: MIT
"""Lookahead pruning inside other libraries: one file per host, imported by its name only.

    lap_ext.adapters.torch_prune     torch.nn.utils.prune: a pruning method, exact global masks
    lap_ext.adapters.torch_ao        torch.ao.pruning: a sparsifier, with torch's schedulers
    lap_ext.adapters.transformers    transformers: a callback of Trainer
    lap_ext.adapters.lightning       lightning: a callback of Trainer
    lap_ext.adapters.llmcompressor   llm-compressor: a modifier for oneshot
    lap_ext.adapters.torch_pruning   Torch-Pruning: an importance for groups of channels
    lap_ext.adapters.nncf            nncf: our masks in its models, so that export follows

Nothing of lap_ext imports them, and they use what lap_ext exports, no more (lightning also the
packing of masks). _callback.py is what the two callbacks share.
"""
