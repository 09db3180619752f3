# SPDX-License-Identifier: MIT
"""The one error class of the package."""


class TopologyError(ValueError):
    """A model that lap_ext cannot follow; the text names the layer, the operation and the way out.

    Example:
        >>> import lap_ext
        >>> issubclass(lap_ext.TopologyError, ValueError)
        True
    """
