# SPDX-License-Identifier: MIT
"""The parts of checkpoint.prune: masks in files, squared norms and scores of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.checkpoint.files import Checkpoint, Entry, Shard
from lap_ext.checkpoint.inside import Stamp
from lap_ext.checkpoint.reading import Buffer, Source, bytes_of
from lap_ext.checkpoint.writing import MaskFile, pack_into
from lap_ext.criteria import Lookahead
from lap_ext.criteria.context import Network
from lap_ext.masks import BitMasks, pack
from lap_ext.places import Chunk, Memory
from lap_ext.places.place import row_length
from lap_ext.pruning.scoring import Scorer
from lap_ext.topology import Layer
from tests.helpers.checkpoints import INPUTS, least_memory, network, prune, write
from tests.helpers.parameters import each_dtype

# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 1000, 2**18 + 11])
def test_pack_into(n: int) -> None:
    mask = torch.rand(n + 3)[3:] < 0.5
    packed = torch.full(((n + 7) // 8,), 7, dtype=torch.uint8)
    pack_into(packed, mask)
    assert torch.equal(packed, pack(mask))


def test_chunks_of_masks_in_any_order(tmp_path: Path) -> None:
    """Chunks that begin and end inside a byte, and a chunk that is written twice."""
    masks = {"a": torch.rand(5, 7) < 0.5, "b": torch.rand(3) < 0.5, "c": torch.rand(2, 50) < 0.5}
    file = MaskFile(tmp_path, {name: tuple(mask.shape) for name, mask in masks.items()})
    assert not file.complete
    file.create()
    assert file.complete
    file.open()
    for name, first, last in (
        ("c", 61, 100), ("c", 0, 3), ("b", 0, 3), ("c", 3, 61), ("a", 8, 9), ("a", 0, 8),
        ("a", 9, 35), ("c", 3, 61),
    ):  # fmt: skip
        file.write(name, first, masks[name].flatten()[first:last].clone())
    with pytest.raises(ValueError, match="the mask of 'a' does not match its checksum"):
        lap_ext.Masks.load(file.path)
    file.seal()
    file.close()
    assert file.complete and lap_ext.Masks.load(file.path) == lap_ext.Masks(masks)
    lap_ext.Masks(masks).save(tmp_path / "saved")
    assert file.path.read_bytes() == (tmp_path / "saved").read_bytes()


# --- chunks of rows -------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding, tied to the output; attention with packed, partly used and grouped weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(137, 24)
        self.packed = nn.Linear(24, 3 * 24)
        self.conv = nn.Conv1d(24, 140, 3, groups=2, padding=1)
        self.norm = nn.BatchNorm1d(140)
        self.back = nn.ConvTranspose1d(140, 24, 3, groups=4, padding=1)
        self.part = nn.Parameter(torch.randn(60, 24))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.packed(x).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.back(self.norm(self.conv(x.mT)).relu()).mT
        x = x + nn.functional.linear(x, self.part[20:44])
        return x @ self.embed.weight.T


@lru_cache
def traced(dtype: torch.dtype) -> tuple[nn.Module, lap_ext.Topology]:
    torch.manual_seed(3)
    model = Tied().to(dtype).eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    return model, lap_ext.trace(model, torch.zeros(1, 6, dtype=torch.int64))


class Rows(Memory):
    """The place of a model in memory that gives its weights in chunks of rows.

    Each is overwritten when the second one after it is asked for, as a buffer is.
    """

    rows = 1

    def chunks(self, layer: Layer, whole: bool = False) -> Iterator[Chunk]:
        (full,) = super().chunks(layer)
        before: list[Tensor] = []
        for chunk in full.split(self.rows * row_length(layer)):
            for old in before[:-1]:
                old.fill_(float("nan"))
            before = [*before[-1:], chunk.weight.clone()]
            yield Chunk.of(layer, before[-1], chunk.first)


@each_dtype
@pytest.mark.parametrize("rows", [1, 100, 1000])
@pytest.mark.parametrize("batch_norm", ["edge", "fold"])
def test_squared_norms_and_scores_of_chunks(batch_norm: str, rows: int, dtype: torch.dtype) -> None:
    model, topology = traced(dtype)
    assert {"embed", "packed", "conv", "back", "part"} == set(topology.layers)
    assert len(topology.layers["embed"].roles) == 2
    place = Rows(topology)
    place.rows = rows
    full, streamed = Network(Memory(topology), batch_norm), Network(place, batch_norm)
    for role in topology.roles:
        for got, want in zip(streamed.norms(role), full.norms(role), strict=True):
            assert torch.equal(got, want), role.layer
    want_scores = lap_ext.scores(model, topology=topology, layers="*", batch_norm=batch_norm)
    for layer in topology.layers.values():
        scorer = Scorer(streamed, Lookahead(), layer)
        got_scores = torch.cat([scorer.of(chunk).flatten() for chunk in place.chunks(layer)])
        assert torch.equal(got_scores, want_scores[layer.name].flatten()), layer.name


def test_products_that_underflow_are_ranked_wide(tmp_path: Path) -> None:
    """Norms so far apart that float32 products vanish: the fused mask and chunks rank alike."""
    net = network()
    with torch.no_grad():
        net[3].weight.mul_(torch.logspace(0, -36, 150))
        net[0].weight.mul_(torch.logspace(0, -20, 150)[:, None])
    source = write(tmp_path / "dense", net.state_dict())
    options: dict[str, Any] = {"sparsity": 0.2, "model": net}
    few = least_memory(lambda few: prune(source, tmp_path / "out", memory=few, **options))
    got = prune(source, tmp_path / "out", memory=few, **options)
    assert got.masks == lap_ext.prune(net, INPUTS, 0.2).masks


# --- offsets beyond 2^31 and 2^32: files with holes, so that little is written --------


def test_masks_at_large_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of weight 2^33 + 5 and those around it, in a file of a gigabyte of nothing."""
    monkeypatch.setattr("lap_ext.masks.file.checksum", lambda *_: "0" * 32)  # as in a new file
    count = (1 << 33) + 100
    file, first = MaskFile(tmp_path, {"big": (1, count), "next": (3,)}), (1 << 33) + 5
    file.create()
    file.open()
    file.write("big", first, torch.tensor([True, False, True]))
    file.write("next", 0, torch.tensor([True, True, False]))
    file.close()
    with BitMasks(file.path) as masks:
        assert (
            masks.chunk("big", first - 3, 8).tolist()
            == [False] * 3 + [True, False, True] + [False] * 2
        )
        assert not masks.chunk("big", first - (1 << 32) - 3, 8).any()
        assert masks.mask("next").tolist() == [True, True, False]


def test_weights_at_large_offsets(tmp_path: Path) -> None:
    """Chunks of rows around elements 2^31 and 2^32, with the norms of their rows."""
    rows, width = (1 << 20) + 2, 4096
    entry = Entry("w", "model.safetensors", "BF16", (rows, width), 80, 2 * rows * width)
    with (tmp_path / entry.shard).open("wb") as file:
        file.truncate(entry.begin + entry.size)
        for row in (1 << 19, 1 << 20):
            file.seek(entry.begin + 2 * row * width)
            pair = torch.full((2,), row / 1024, dtype=torch.bfloat16)
            file.write(bytes_of(pair))
    stamp = Stamp.of((tmp_path / entry.shard).stat())
    shard = Shard(entry.shard, tmp_path / entry.shard, entry.begin, (entry,), stamp)
    source, buffer = Source(Checkpoint(tmp_path, (shard,), None)), Buffer()
    layer, norms = big_layer(rows, width)
    scorer = Scorer(norms, Lookahead(), layer)
    for row in (1 << 19, 1 << 20):
        first = row * width
        assert first in (1 << 31, 1 << 32)
        source.fill(entry, 2 * first, buffer.view(4 * width))
        chunk = Chunk.of(layer, buffer.tensor(2 * width, torch.bfloat16), first)
        assert chunk.weight[:2].tolist() == [row / 1024] * 2 and not chunk.weight[2:].any()
        assert scorer.of(chunk)[:2].tolist() == [row / 1024 * row] * 2


def big_layer(rows: int, width: int) -> tuple[Layer, Any]:
    """A layer of many rows, whose output channel o has the norm o."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(width, rows, bias=False, dtype=torch.bfloat16))
    topology = lap_ext.trace(net, torch.empty(1, width, dtype=torch.bfloat16, device="meta"))
    norms = torch.ones(width, dtype=torch.float64), torch.arange(rows, dtype=torch.float64)
    return topology.layers["0"], SimpleNamespace(norms=lambda role: norms)
