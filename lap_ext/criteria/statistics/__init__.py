# SPDX-License-Identifier: MIT
"""What data shows of a model: activations, gradients, curvature.

Measured on the traced graph; the model is left as it was.
"""
