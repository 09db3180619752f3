# SPDX-License-Identifier: MIT
"""Tensors: one layer between its neighbors, and rankings. Nothing here knows of a model.

Importing the package loads nothing, so that lap_ext.numpy works without torch.
"""
