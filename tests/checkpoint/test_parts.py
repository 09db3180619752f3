# SPDX-License-Identifier: MIT
"""The parts of checkpoint.prune: thresholds, masks in files, squared norms and scores of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lap_ext
from lap_ext.checkpoint import ranking
from lap_ext.checkpoint.files import Checkpoint, Entry, Shard
from lap_ext.checkpoint.inside import Stamp
from lap_ext.checkpoint.layer_scores import LayerScores, row_length
from lap_ext.checkpoint.norms import FileNetwork
from lap_ext.checkpoint.reading import Buffer, Source, bytes_of
from lap_ext.checkpoint.writing import MaskFile, pack_into
from lap_ext.criteria import Lookahead
from lap_ext.criteria.context import Network
from lap_ext.masks import BitMasks, pack
from lap_ext.topology.roles import Part
from tests.helpers.checkpoints import INPUTS, least_memory, network, prune, write
from tests.helpers.parameters import each_dtype

# --- rank -----------------------------------------------------------------------------------------


def threshold_masks(
    slices: list[Tensor], keep: int, interval: tuple[int, int], capacity: int, step: int = 7
) -> list[Tensor]:
    """Makes masks by a threshold, of keys that come step at a time."""

    def read_keys(low: int, high: int) -> Iterator[tuple[int, Tensor]]:
        del low, high
        for index, x in enumerate(slices):
            for chunk in x.split(step):
                yield index, ranking.keys_of(chunk)

    sizes, dtype = [x.numel() for x in slices], slices[0].dtype
    threshold = ranking.threshold(read_keys, sizes, keep, interval, dtype, capacity)
    masks = []
    for x, share in zip(slices, threshold.ties, strict=True):
        flags, ties = [], share
        for chunk in x.split(step):
            mask, taken = ranking.mask_of(ranking.keys_of(chunk), threshold.key, ties)
            ties -= taken
            flags.append(mask)
        masks.append(torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool))
    assert [int(mask.sum()) for mask in masks] == list(threshold.kept)
    return masks


values = st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.0000001, 2.0, 3.5, 1e30, float("inf")])


@given(
    st.lists(st.lists(values, max_size=40), min_size=1, max_size=4),
    st.integers(0, 170),
    st.tuples(values, values),
    st.sampled_from([0, 1, 5, 1000]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_thresholds_are_those_of_topk_mask(
    scores: list[list[float]],
    keep: int,
    ends: tuple[float, float],
    capacity: int,
    dtype: torch.dtype,
) -> None:
    """Whatever the interval at the start, and whatever is held."""
    slices = [torch.tensor(x, dtype=dtype) for x in scores]
    low, high = sorted(int(ranking.keys_of(torch.tensor(x, dtype=dtype))) for x in ends)
    want = lap_ext.topk_mask(slices, keep=keep)
    for got, mask in zip(threshold_masks(slices, keep, (low, high), capacity), want, strict=True):
        assert torch.equal(got, mask)


@pytest.mark.parametrize("capacity", [0, 100, 10**6])
@pytest.mark.parametrize("keep", [1, 999, 30_000, 59_999])
def test_thresholds_of_many_keys(keep: int, capacity: int) -> None:
    slices = [torch.rand(20_000).square(), torch.rand(30_000).round(decimals=2), torch.rand(10_000)]
    sample = torch.cat(slices)[::31].double()
    interval = ranking.bracket(sample, keep, 60_000, torch.float32)
    assert interval[0] <= interval[1]
    want = lap_ext.topk_mask(slices, keep=keep)
    for start in (interval, (0, ranking.largest(torch.float32))):
        masks = threshold_masks(slices, keep, start, capacity, 997)
        assert all(map(torch.equal, masks, want)) and len(masks) == len(want)


def test_a_good_sample_needs_one_pass() -> None:
    scores = torch.rand(100_000)
    interval = ranking.bracket(scores[::17].double(), 50_000, 100_000, torch.float32)
    passes = []

    def read_keys(low: int, high: int) -> Iterator[tuple[int, Tensor]]:
        assert (low, high) == interval
        passes.append(1)
        yield 0, ranking.keys_of(scores)

    threshold = ranking.threshold(
        read_keys, [100_000], 50_000, interval, torch.float32, capacity=10_000
    )
    assert len(passes) == 1
    assert threshold.kept == (50_000,)


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


def chunks(weight: Tensor, width: int, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Gives a weight in chunks of rows; each is overwritten before the next, as a buffer is."""
    buffer = torch.empty(0)
    for first in range(0, weight.numel(), rows * width):
        buffer.fill_(float("nan"))
        buffer = weight.detach().flatten()[first : first + rows * width].clone()
        yield first, buffer


@each_dtype
@pytest.mark.parametrize("rows", [1, 100, 1000])
@pytest.mark.parametrize("batch_norm", ["edge", "fold"])
def test_squared_norms_and_scores_of_chunks(batch_norm: str, rows: int, dtype: torch.dtype) -> None:
    model, topology = traced(dtype)
    assert {"embed", "packed", "conv", "back", "part"} == set(topology.layers)
    assert len(topology.layers["embed"].roles) == 2
    full, streamed = Network(topology, batch_norm), FileNetwork(topology, batch_norm)
    for layer in topology.layers.values():
        streamed.measure_chunks(layer, chunks(layer.weight, row_length(layer), rows))
    for role in topology.roles:
        for got, want in zip(streamed.norms(role), full.norms(role), strict=True):
            assert torch.equal(got, want), role.layer
    want_scores = lap_ext.scores(model, topology=topology, layers="*", batch_norm=batch_norm)
    for layer in topology.layers.values():
        scores = LayerScores(streamed, Lookahead(), layer)
        weights = chunks(layer.weight, row_length(layer), rows)
        got_scores = torch.cat([scores.of(weight, first) for first, weight in weights])
        assert torch.equal(got_scores, want_scores[layer.name].flatten()), layer.name
        near = scores.at(layer.weight.detach().flatten()[::3], 3)
        assert torch.allclose(near, got_scores[::3].double(), rtol=1e-5)


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
    scores = LayerScores.__new__(LayerScores)
    scores.how, scores._criterion, scores.layer = "plain", Lookahead(), None
    norms = torch.arange(rows, dtype=torch.float64)
    scores._parts = [(Part((rows, width)), norms, None)]
    for row in (1 << 19, 1 << 20):
        first = row * width
        assert first in (1 << 31, 1 << 32)
        source.fill(entry, 2 * first, buffer.view(4 * width))
        chunk = buffer.tensor(2 * width, torch.bfloat16)
        assert chunk[:2].tolist() == [row / 1024] * 2 and not chunk[2:].any()
        assert scores._of(chunk, first)[:2].tolist() == [row / 1024 * row] * 2
        near = scores.at(chunk[:2], first + 1)  # the weights 0 and first + 1
        assert near.tolist() == [0.0, row / 1024 * row]
