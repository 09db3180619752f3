# SPDX-License-Identifier: MIT
"""What PyTorch itself counts while a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(model: nn.Module, args: Any = (), kwargs: Any = None) -> int:
    """FLOPs of a run, every operation taken apart into the products that PyTorch counts.

    It counts no fused attention of a CPU, no LSTM of oneDNN, no fused encoder layer, and no grouped
    product of experts, which are the same products.
    """
    grouped: Any = {torch.ops.aten._grouped_mm: _grouped}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        grouped[torch.ops.transformers.grouped_mm_fallback] = _grouped
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=grouped) as counter,
        ):
            model(*args, **(kwargs or {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)
    return int(counter.get_total_flops())


def _grouped(x: Any, w: Any, *rest: Any, **named: Any) -> int:
    """Each row of x [S, I] meets the matrix [I, O] of one group of w [E, I, O]."""
    return 2 * x[0] * x[1] * w[2]
