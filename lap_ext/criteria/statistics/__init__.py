# SPDX-License-Identifier: MIT
"""Statistics of a model over data: activations, gradients, curvature.

They are measured on the traced graph; the model is left unchanged.
"""
