# SPDX-License-Identifier: MIT
"""Names and texts that several rooms share."""

from __future__ import annotations


def layer_name(parameter: str) -> str:
    """Returns the name of a parameter's layer: its own without a trailing ".weight".

    Example:
        >>> layer_name("conv1.weight"), layer_name("embedding")
        ('conv1', 'embedding')
    """
    return parameter.removesuffix(".weight")


def parameter_names(layer: str) -> tuple[str, str]:
    """Returns the names that the parameter of a layer may have; the first one that exists is it.

    Example:
        >>> parameter_names("conv1")
        ('conv1.weight', 'conv1')
    """
    return f"{layer}.weight", layer
