# SPDX-License-Identifier: MIT
"""One command that proves the CUDA kernels on a GPU: python -m benchmarks.gpu (see README.md)."""
