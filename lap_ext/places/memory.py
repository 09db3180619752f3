# SPDX-License-Identifier: MIT
"""The weights of a model in memory: each layer is one chunk, on whatever device it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.ops.check import FLOATS
from lap_ext.places.place import Chunk, nonzero
from lap_ext.topology import Layer, Topology

_PIECE = 1 << 17  # scores of a layer at a time
_HELD, _LEAST_HELD = 64, 1 << 16  # one key of so many may be held, and these always


class Memory:
    """The place of a model whose weights are in memory.

    Args:
        topology: of the model.
        masks: layer name -> mask of the weights that may be kept, from an earlier pruning.
    """

    held = True
    pieces = _PIECE
    sampled = 0

    def __init__(self, topology: Topology, masks: Mapping[str, Tensor] | None = None) -> None:
        self.topology = topology
        self.masks = dict(masks or {})
        self._live: dict[str, Tensor | None] = {}

    def dtype(self, layer: Layer) -> torch.dtype:
        """Returns the dtype of a layer's weights."""
        return (layer.effective if layer.computed else layer.weight).dtype

    def bytes(self, layer: Layer) -> int:
        """Counts the bytes of a layer's weights."""
        return layer.weight.nbytes

    def starts(self, layer: Layer) -> Sequence[int]:
        """Returns [0]: a layer is stored in one slice."""
        return [0]

    def fits(self, layer: Layer, beside: int) -> bool:
        """Returns True: all layers are there."""
        return True

    def ordered(self, layers: Iterable[Layer]) -> list[Layer]:
        """Lists layers as they come."""
        return list(layers)

    def chunks(self, layer: Layer, whole: bool = False) -> Iterator[Chunk]:
        """Gives a layer as one chunk, not copied."""
        yield Chunk(layer, readable(layer))

    def each(self, layers: Sequence[Layer], beside: int) -> Iterator[tuple[Layer, Iterator[Chunk]]]:
        """Gives layers one after the other."""
        for layer in layers:
            yield layer, self.chunks(layer)

    def sample(self, layer: Layer, count: int) -> Iterator[Chunk]:
        """Gives all weights: nothing has to be read."""
        return self.chunks(layer)

    def mask(self, chunk: Chunk) -> Tensor | None:
        """Returns what the mask of the layer says of a chunk."""
        mask = self.masks.get(chunk.layer.name)
        return None if mask is None else chunk.cut_from(mask)

    def live(self, chunk: Chunk) -> Tensor | None:
        """Returns which weights may be kept and are not stored as zero; looks at a layer once."""
        name = chunk.layer.name
        if name not in self._live:
            stored = chunk.layer.weight.detach()
            live = nonzero(stored, self.masks.get(name))
            self._live[name] = None if live is None else live.contiguous()
        live = self._live[name]
        return None if live is None else chunk.cut_from(live)

    def set_masks(self, layer: Layer, masks: Iterable[tuple[Chunk, Tensor]]) -> None:
        """Sets the mask of a layer, which is one chunk."""
        ((_, mask),) = masks
        self.masks[layer.name] = self._live[layer.name] = mask

    def round(self, number: int, make: Callable[[], None]) -> None:
        """Makes the masks: nothing outlives the process."""
        make()

    def capacity(self, count: int) -> int:
        """Returns a share of the weights, and so much at least."""
        return max(count // _HELD, _LEAST_HELD)

    def noted(self, name: str, make: Callable[[], Any]) -> Any:
        """Makes the value: nothing outlives the process."""
        return make()

    def noted_tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Makes the tensors: nothing outlives the process."""
        return make()

    def total(self, counts: Tensor) -> Tensor:
        """Returns the counts: one process holds all weights."""
        return counts


def readable(layer: Layer) -> Tensor:
    """Returns the weight that a layer uses, detached; raises unless its values can be read."""
    weight = layer.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        alone = f"{{exclude={layer.name!r}}} with {{criterion='magnitude'}}"
        cure = f"Leave it out: {alone}, which reads no neighbors."
        if not weight.is_complex():
            cure = "Convert the model first, as with model.to(torch.bfloat16), or dequantize it."
        raise LapTypeError(f"weights of {', '.join(FLOATS)}", dtype, cure, layer=layer.name)
    if weight.layout != torch.strided:
        cure = "Convert it with to_dense()."
        raise LapTypeError("dense weights", f"layout {weight.layout}", cure, layer=layer.name)
    if weight.is_meta:
        raise LapValueError(
            "weights with values",
            "one on the meta device",
            "Load them first: model.to_empty(device='cpu'), then model.load_state_dict(...).",
            layer=layer.name,
        )
    return layer.effective
