# SPDX-License-Identifier: MIT
"""Functions of tensors: one layer between its neighbors, and rankings. No function takes a model.

Importing the package loads nothing, so that lap_ext.numpy works without torch.
"""
