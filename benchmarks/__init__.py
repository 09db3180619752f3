# SPDX-License-Identifier: MIT
"""Benchmarks of lap_ext: python -m benchmarks (see README.md)."""
