# SPDX-License-Identifier: MIT
"""Computes statistics of each layer's scores, for a table and for JSON.

    q %            the smallest score that at least q % of the layer's weights do not exceed
    squared norm   sum of the squares of the layer's scores

Ranks are exact: nothing is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lap_ext._text import columns, html_table
from lap_ext.ops.ranking import kth_largest
from lap_ext.pruning import normalization
from lap_ext.topology import Layer

_TENTHS = {"min": 0, "10%": 1, "median": 5, "90%": 9, "max": 10}
_NUMBERS = range(2, 5 + len(_TENTHS))  # columns of numbers


@dataclass(frozen=True)
class LayerFigures:
    """The scores of one layer in figures.

    Attributes:
        name, kind, shape: those of the layer.
        dtype: the dtype of the scores, for example "float32".
        weights: the number of scores.
        zeros: the number of scores that are zero (a channel before or after is dead).
        quantiles: "min", "10%", "median", "90%" and "max"; None if the layer has no weight.
        squared_norm: the sum of the squares of the scores.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    zeros: int
    quantiles: Mapping[str, float | None]
    squared_norm: float

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON, which has no infinity, so that infinity is the text "inf"."""
        quantiles = {name: _json(value) for name, value in self.quantiles.items()}
        facts = vars(self) | {"shape": list(self.shape), "quantiles": quantiles}
        return facts | {"squared_norm": _json(self.squared_norm)}


@dataclass(frozen=True)
class ScoreTable:
    """Figures of the scores of all layers; print it for a table.

    Attributes:
        layers: one row per layer, in the order of the network.
    """

    layers: Sequence[LayerFigures]

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON."""
        return {"layers": [row.to_dict() for row in self.layers]}

    def __str__(self) -> str:
        return columns(self._rows(), right=_NUMBERS)

    def _repr_html_(self) -> str:
        return html_table(self._rows(), right=_NUMBERS)

    def _rows(self) -> list[Sequence[str]]:
        """Makes the table: a head, a row a layer, the sums."""
        rows: list[Sequence[str]] = [
            ("layer", "shape", "weights", "zeros", *_TENTHS, "squared norm")
        ]
        for row in self.layers:
            shape = "x".join(map(str, row.shape))
            numbers = ["" if x is None else f"{x:.3g}" for x in row.quantiles.values()]
            counts = _counts(row.weights, row.zeros)
            rows.append((row.name, shape, *counts, *numbers, f"{row.squared_norm:.3g}"))
        counts = _counts(sum(x.weights for x in self.layers), sum(x.zeros for x in self.layers))
        squared_norm = math.fsum(row.squared_norm for row in self.layers)
        rows.append(("all", "", *counts, *[""] * len(_TENTHS), f"{squared_norm:.3g}"))
        return rows


def figures(layer: Layer, scores: Tensor) -> LayerFigures:
    """Computes the figures of a layer's scores.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 1))
        >>> layer = lap_ext.trace(net, torch.ones(1, 3)).layers["0"]
        >>> row = figures(layer, torch.tensor([[0., 3., 4.]]))
        >>> row.zeros, row.quantiles["median"], row.squared_norm     # 3 * 3 + 4 * 4
        (1, 3.0, 25.0)
    """
    count = scores.numel()
    ranks = {name: max(1, -(-count * tenths // 10)) for name, tenths in _TENTHS.items()}
    quantiles = {
        name: float(kth_largest(scores, count - rank + 1)) if count else None
        for name, rank in ranks.items()
    }
    return LayerFigures(
        layer.name,
        layer.kind,
        layer.shape,
        str(scores.dtype).removeprefix("torch."),
        count,
        count - int(scores.count_nonzero()),
        quantiles,
        normalization.squares_of(scores).value(),
    )


def _counts(weights: int, zeros: int) -> tuple[str, str]:
    return f"{weights:,}", f"{zeros / max(1, weights):.2%}"


def _json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
