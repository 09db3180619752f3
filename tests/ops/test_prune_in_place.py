# SPDX-License-Identifier: MIT
"""prune_ gives mask's mask and writes +0.0 over what is dropped, and over nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import each_dtype, each_threads

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bit patterns, so that -0.0 is not 0.0."""
    return x.detach().contiguous().cpu().view(INTEGER[x.element_size()])


def pruned(w: Tensor, mask: Tensor) -> Tensor:
    """Kept weights with their bits, +0.0 elsewhere."""
    return torch.where(mask, w, torch.zeros((), dtype=w.dtype))


@each_dtype
@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda s: s.name)
def test_shapes_and_layouts(shape: cases.Shape, dtype: torch.dtype, device: str) -> None:
    w, ins, outs = cases.random_layer(shape, dtype)
    w.view(-1)[::7] *= -0.0  # some zeros of either sign
    exact = oracle.exact_score(w, ins, outs, shape.groups, shape.transposed)
    kinds = {"groups": shape.groups, "transposed": shape.transposed}
    for layout in cases.layouts_of(w.dim()):
        for keep in {0, 1, w.numel() // 2, w.numel() - 1, w.numel(), w.numel() + 1}:
            laid = cases.LAYOUTS[layout](w.to(device).clone())
            strides = laid.stride()
            got = lap_ext.prune_from_norms_(
                laid, ins.to(device), outs.to(device), keep=keep, **kinds
            )
            mask = oracle.rank_mask(exact, keep)
            assert torch.equal(got.cpu(), mask), (layout, keep)
            assert torch.equal(bits(laid), bits(pruned(w, mask))), (layout, keep)
            assert laid.stride() == strides and got.is_contiguous()


def test_neighbors_of_a_view_are_untouched(device: str) -> None:
    """Pruning a slice writes nothing between its elements."""
    wide = torch.full((8, 20), 77.0, device=device)
    view = wide[1:7:2, 3:19:3]
    view.copy_(torch.randn(3, 6))
    before = wide.clone()
    mask = lap_ext.prune_(None, view, None, sparsity=0.5)
    assert int(mask.sum()) == 9
    inside = torch.zeros(8, 20, dtype=torch.bool, device=device)
    inside[1:7:2, 3:19:3] = ~mask
    assert torch.equal(wide, torch.where(inside, 0.0, before))


@each_dtype
def test_eligible(dtype: torch.dtype, device: str) -> None:
    w, ins, outs = cases.random_layer(cases.Shape("", (37, 129)), dtype)
    exact = oracle.exact_score(w, ins, outs)
    eligible = torch.rand(w.shape) < 0.3
    for keep in (0, 10, 1000, 3000):
        laid = w.to(device).clone()
        got = lap_ext.prune_from_norms_(
            laid, ins.to(device), outs.to(device), keep=keep, mask=eligible.to(device)
        )
        expected = oracle.rank_mask(exact, keep, eligible)
        assert torch.equal(got.cpu(), expected)
        assert torch.equal(bits(laid), bits(pruned(w, expected)))


@each_threads
@pytest.mark.parametrize("name", ["random", "crowd", "zeros_60", "leading_bits", "sorted"])
def test_large(name: str, threads: int) -> None:
    """The sampled plan, and data that misleads it, then zeroed."""
    torch.set_num_threads(threads)
    w = cases.hostile(name, 1001 * 1400, torch.float32).view(1001, 1400)
    order = oracle.rank_order(
        oracle.exact_score(w, torch.ones(1400, dtype=torch.float64), torch.ones(1001).double())
    )
    for sparsity in (0.5, 0.99):
        expected = oracle.first_of(order, oracle.keep_count(sparsity, w.numel()), w.shape)
        got = w.clone()
        assert torch.equal(lap_ext.prune_(None, got, None, sparsity=sparsity), expected)
        assert torch.equal(bits(got), bits(pruned(w, expected)))


@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    w = torch.zeros(shape, device=device)
    assert lap_ext.prune_(None, w, None, sparsity=0.5).shape == shape


def test_from_neighbors(device: str) -> None:
    w_prev, w_next = torch.randn(6, 4, device=device), torch.randn(3, 5, device=device)
    w = torch.randn(5, 6, device=device)
    expected = lap_ext.mask(w_prev, w, w_next, keep=11)
    before = w.clone()
    assert torch.equal(lap_ext.prune_(w_prev, w, w_next, keep=11), expected)
    assert torch.equal(w, before * expected)


def test_the_weight_may_be_its_own_neighbor(device: str) -> None:
    """Tied weights: the norms are taken before anything is zeroed."""
    w = torch.randn(6, 6, device=device)
    expected = lap_ext.mask(w.clone(), w.clone(), w.clone(), keep=9)
    assert torch.equal(lap_ext.prune_(w, w, w, keep=9), expected)


def test_parameter(device: str) -> None:
    """A leaf that requires grad is pruned in place without a graph."""
    w = torch.nn.Parameter(torch.randn(4, 5, device=device))
    expected = lap_ext.mask(None, w, None, keep=7)
    assert torch.equal(lap_ext.prune_(None, w, None, keep=7), expected)
    assert w.requires_grad and w.is_leaf and w.grad_fn is None
    assert int(w.count_nonzero()) == 7
