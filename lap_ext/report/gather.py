# SPDX-License-Identifier: MIT
"""Gathers the facts of a report, layer by layer, from chunks of weights in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lap_ext.report.facts import Facts, LayerFacts, Measure

# weights, whether each is kept, scores if they are known
Chunk = tuple[Tensor, Tensor, "Tensor | None"]


@dataclass
class LayerWeights:
    """The weights of one layer, before and after.

    Attributes:
        facts: of the layer, which `gather` fills in.
        matrix: the weight as [rows, columns, *window].
        groups: of a convolution or of experts.
        itemsize: bytes of a stored weight.
        copies: how often it is stored.
        chunks: yields all weights in order, in chunks of at most so many.
    """

    facts: LayerFacts
    matrix: tuple[int, ...]
    groups: int
    itemsize: int
    copies: int
    chunks: Callable[[int], Iterator[Chunk]]

    @property
    def saved(self) -> int:
        """Computes the bytes that a sparse format saves: pruned weights, less one bit a weight."""
        facts = self.facts
        pruned = (facts.total - facts.kept) * self.itemsize
        return self.copies * (pruned - (facts.total + 7) // 8)


def gather(
    facts: Facts, layers: Iterable[LayerWeights], on_read: Callable[[str, int], Any]
) -> Facts:
    """Measures all layers, and completes the facts.

    Args:
        facts: of the pruning.
        layers: in the order of the network.
        on_read: called with a layer's name and bytes, after each chunk that is measured.

    Returns:
        The same facts, with layers and the size in a sparse format.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[3., 1.]]), torch.tensor([[True, False]]), None
        >>> layer = LayerWeights(LayerFacts("fc", "linear", (1, 2)), (1, 2), 1, 4, 1,
        ...                      lambda most: iter([weights]))
        >>> facts = gather(Facts("net", "lookahead", [], bytes_before=8), [layer], print)
        fc 8
        >>> facts.kept, facts.mass, facts.bytes_sparse       # 9 / 10; 8 - 4 + 1
        (1, 0.9, 5)
    """
    rows, saved = [], 0
    for layer in layers:
        measure = Measure(layer.facts, layer.matrix, layer.groups)
        for weights, kept, scores in layer.chunks(measure.step):
            measure.add(weights, kept, scores)
            on_read(layer.facts.name, weights.nbytes)
        measure.finish()
        rows.append(layer.facts)
        saved += layer.saved
    facts.layers = rows
    if facts.bytes_before is not None:
        facts.bytes_sparse = facts.bytes_before - saved
    return facts
