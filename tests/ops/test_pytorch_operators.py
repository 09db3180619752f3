# SPDX-License-Identifier: MIT
"""The operators inside PyTorch: opcheck, compile, export, meta tensors, autograd.

Values are not the subject here (they are elsewhere); each result is still compared with eager.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

import lap_ext
import lap_ext.ops.schema
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import DTYPES, SCORE_DTYPE, each_dtype

OPS = torch.ops.lap_ext
NAMES = """row_squared_norms col_squared_norms squared_norms norm score mask prune_ topk_mask
    global_mask kth_largest count_keys key_histogram squares_above threshold_mask random_scores_
    masked_zero_ nonzero_mask nm_mask transposable_mask block_sums_ block_mask""".split()
STRUCTURED = {"nm_mask", "transposable_mask", "block_sums_", "block_mask"}
WRITES = {
    "prune_": "w",
    "random_scores_": "out",
    "masked_zero_": "weight",
    "block_sums_": "sums",
}
CHUNKED: dict[str, list[tuple[Any, ...]]] = {  # what follows scores and mask
    "count_keys": [(0, 1 << 30, True), (5, 5, False)],
    "key_histogram": [(0, (1 << 30) - 1, 20, 1 << 10)],
    "squares_above": [(5, 0)],
    "threshold_mask": [(1 << 29, 2)],
}


def layer(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(w_prev, w, w_next) of a small convolution."""
    return (
        torch.randn(6, 4, 3, 3).to(dtype),
        torch.randn(5, 6, 3, 3).to(dtype),
        torch.randn(7, 5, 1, 1).to(dtype),
    )


def flags_of(scores: list[Tensor]) -> list[Tensor]:
    """Contiguous masks, as the ops expect them."""
    return [(s > 0).contiguous() for s in scores]


def structured(op: str) -> list[tuple[Any, ...]]:
    """Arguments of an op of structures."""
    made: list[tuple[Any, ...]] = []
    for dtype in DTYPES:
        w, rows, cols = torch.randn(8, 12, 3).to(dtype), torch.rand(8).double(), torch.rand(24)
        for flags, norms in ((None, rows), ((w > 0).contiguous(), rows[:0])):
            given, tail = (w, norms, cols.double(), 2), (flags, True)
            if op == "nm_mask":
                made += [(*given, 2, 4, along_rows, *tail) for along_rows in (False, True)]
            elif op == "transposable_mask":
                made.append((*given, True, *tail))
            elif op == "block_sums_":
                sums = torch.zeros(4, 3, dtype=torch.float64)
                made.append((sums, *given, [2, 4], 0, 4, True, *tail))
            else:
                made.append((torch.rand(4, 3) < 0.5, [8, 12, 3], [2, 4], 0, 4, flags))
    return made


def samples(op: str) -> list[tuple[Any, ...]]:
    """Arguments of an op: plain, grouped, transposed, masked, strided, empty, each dtype."""
    if op in CHUNKED:
        scores = [torch.rand(4, 6), torch.rand(24, dtype=torch.float64), torch.zeros(0)]
        masks = [None, torch.rand(4, 6) < 0.5]
        return [(x, m, *args) for x in scores[:2] for m in masks for args in CHUNKED[op]] + [
            (scores[2], None, *args) for args in CHUNKED[op]
        ]
    if op == "random_scores_":
        return [(torch.zeros(4, 6, dtype=dtype), -3, 2, 5) for dtype in (torch.float, torch.double)]
    if op == "masked_zero_":
        return [(torch.randn(4, 6).to(dtype), torch.rand(4, 6) < 0.5) for dtype in DTYPES]
    if op == "nonzero_mask":
        some = torch.rand(4, 6) < 0.5
        made = [(some.to(dtype), mask) for dtype in DTYPES for mask in (None, some)]
        return [*made, (torch.randn(6, 4).t(), some), (torch.zeros(0), None)]
    ins, outs = torch.rand(6, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    weights = [torch.randn(4, 6).to(dtype) for dtype in DTYPES]
    weights.append(torch.randn(6, 4).t())
    grouped = torch.randn(4, 3, 3, 3)
    flags = torch.rand(4, 6) < 0.5
    empty = torch.zeros(0, 6), ins, torch.zeros(0, dtype=torch.float64)
    if op == "norm":
        return [([ins],), ([ins, ins * 2, ins * 3],)]
    if op in ("row_squared_norms", "col_squared_norms", "squared_norms"):
        groups = () if op == "row_squared_norms" else (2,)
        return [(w, *groups, True, "w_prev") for w in [*weights, grouped, torch.zeros(4, 0)]]
    if op == "score":
        tail: tuple[Any, ...] = (True,)
        flagged: list[tuple[Any, ...]] = [tail]
    else:
        flagged = [(3, None), (3, flags), (0, None), (99, flags)]
    if op in ("score", "mask", "prune_"):
        made = []
        for extra in flagged:
            amount = () if op == "score" else extra
            made += [(w.clone(), ins, outs, *amount, 1, False, True) for w in weights]
        none = () if op == "score" else (2, None)
        made.append((grouped.clone(), ins, outs, *none, 2, False, True))
        made.append((torch.randn(6, 2, 3), ins, outs, *none, 2, True, True))
        made.append((*empty, *none, 1, False, True))
        return made
    lists = [[w] for w in weights] + [[weights[0], torch.tensor(1.0), torch.zeros(0), grouped]]
    if op == "global_mask":
        none = torch.zeros(0, dtype=torch.float64)
        both = [weights[0], weights[0].bfloat16(), torch.rand(7)], [outs, outs, none]
        return [
            (*both, [ins, ins, none], [1, 1, 1], 3, masks, True)
            for masks in ([], flags_of(both[0]))
        ]
    if op == "kth_largest":
        return [(scores, 2, True) for scores in lists]
    return [(scores, 3, masks, True) for scores in lists for masks in ([], flags_of(scores))]


@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op: str, device: str) -> None:
    for args in structured(op) if op in STRUCTURED else samples(op):
        moved = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), args)
        library.opcheck(getattr(OPS, op).default, moved)


def test_schemas() -> None:
    """Only what ends in an underscore writes, and only to one argument."""
    for op in NAMES:
        schema = getattr(OPS, op).default._schema
        written = [x.name for x in schema.arguments if x.alias_info is not None]
        assert written == ([WRITES[op]] if op in WRITES else [])
        assert schema.is_mutable == (op in WRITES)


def everything(w_prev: Tensor, w: Tensor, w_next: Tensor) -> tuple[Any, ...]:
    """All public functions of a layer, as a user would trace them."""
    neighbor = lap_ext.Neighbor(w_prev, scale=w_prev[:, 0, 0, 0] * 0 + 2)
    in_norm, out_norm = lap_ext.neighbor_norms([neighbor, lap_ext.IDENTITY], w, w_next)
    scores = lap_ext.score(w_prev, w, w_next)
    mask = lap_ext.mask(w_prev, w, w_next, sparsity=0.7)
    again = lap_ext.mask(neighbor, w, w_next, keep=9, mask=mask)
    masks = lap_ext.topk_mask([scores, w_prev], sparsity=0.5)
    kth = lap_ext.kth_largest(scores, 5)
    rest = lap_ext.mask_from_norms(w, in_norm, out_norm, keep=4)
    return in_norm, out_norm, scores, mask, again, *masks, kth, rest, scores * mask + kth


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend=backend)
    for sizes in ((6, 5), (8, 3)) if backend == "aot_eager" else ((6, 5),):
        args = [
            torch.randn(sizes[0], 4, 3, 3, device=device),
            torch.randn(sizes[1], sizes[0], 3, 3, device=device),
            torch.randn(7, sizes[1], 1, 1, device=device),
        ]
        for got, expected in zip(compiled(*args), everything(*args), strict=True):
            assert torch.equal(got, expected) and got.dtype == expected.dtype


def test_compile_prune_(device: str) -> None:
    """Mutation survives functionalization: the caller's w changes."""
    torch._dynamo.reset()

    def step(w_prev: Tensor, w: Tensor, w_next: Tensor) -> tuple[Tensor, Tensor]:
        kept = lap_ext.prune_(w_prev, w, w_next, sparsity=0.8)
        return kept, w * 2

    args = [x.to(device) for x in layer()]
    twin = copy.deepcopy(args)
    expected = step(*twin)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    assert all(map(torch.equal, got, expected)) and torch.equal(args[1], twin[1])


class Scored(nn.Module):
    """A module whose forward uses the library."""

    def __init__(self) -> None:
        super().__init__()
        self.w_prev, self.w_next = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 5))

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        mask = lap_ext.mask(self.w_prev, w, self.w_next, keep=7)
        return mask, lap_ext.score(self.w_prev, w, self.w_next)


def test_export() -> None:
    w, module = torch.randn(5, 6), Scored()
    exported = torch.export.export(module, (w,), strict=True)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"lap_ext.mask.default", "lap_ext.score.default"} <= targets
    other = torch.randn(5, 6)
    assert all(map(torch.equal, exported.module()(other), module(other)))


@each_dtype
def test_meta(dtype: torch.dtype) -> None:
    """Shapes and dtypes without data, however large."""
    w = torch.empty(1 << 20, 1 << 16, dtype=dtype, device="meta")
    w_prev = torch.empty(1 << 16, 8, dtype=dtype, device="meta")
    scores = lap_ext.score(w_prev, w, None)
    assert scores.shape == w.shape and scores.dtype == SCORE_DTYPE[dtype] and scores.is_meta
    masks = (
        lap_ext.mask(w_prev, w, lap_ext.IDENTITY, sparsity=0.9),
        lap_ext.prune_(w_prev, w, None, keep=5),
        lap_ext.topk_mask([w_prev, w], keep=5)[1],
    )
    assert all(m.shape == w.shape and m.dtype == torch.bool and m.is_meta for m in masks)
    in_norm, out_norm = lap_ext.neighbor_norms([w_prev, lap_ext.IDENTITY], w, None)
    assert in_norm.shape == (1 << 16,) and out_norm.shape == (1 << 20,)
    assert lap_ext.kth_largest(w, 1 << 35).shape == () and in_norm.dtype == torch.float64


def test_inputs_that_require_grad(device: str) -> None:
    """They work, give no gradient and no warning (pytest turns warnings into errors)."""
    args = [x.to(device).requires_grad_() for x in layer()]
    plain = [x.detach().clone() for x in args]
    for got, expected in zip(everything(*args)[:-1], everything(*plain)[:-1], strict=True):
        assert not got.requires_grad and got.grad_fn is None
        assert torch.equal(got, expected)
    loss = (args[1] * lap_ext.mask(*args, sparsity=0.5)).sum()
    loss.backward()
    assert args[0].grad is None and args[1].grad is not None
    assert not lap_ext.bn_scale(nn.BatchNorm1d(3)).requires_grad


def test_prune_tells_autograd(device: str) -> None:
    """A graph that saved w must fail in backward, not use the pruned values silently."""
    w = torch.randn(5, 6, device=device)
    x = torch.randn(6, device=device, requires_grad=True)
    before = w._version
    y = (w * x).sum()
    lap_ext.prune_(None, w, None, sparsity=0.5)
    assert w._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_prune_of_a_parameter_then_train(device: str) -> None:
    w = nn.Parameter(torch.randn(4, 3, device=device))
    mask = lap_ext.prune_(None, w, None, keep=5)
    (w * 2).sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.full_like(w, 2.0))
    assert torch.equal(w != 0, mask)


def test_prune_of_a_view_bumps_the_base(device: str) -> None:
    base = torch.randn(8, 6, device=device)
    before = base._version
    lap_ext.prune_(None, base[::2], None, sparsity=0.5)
    assert base._version > before


def test_inference_and_no_grad(device: str) -> None:
    with torch.inference_mode():
        w = torch.randn(4, 6, device=device)
        expected = lap_ext.mask(None, w, None, keep=5)
        assert torch.equal(lap_ext.prune_(None, w, None, keep=5), expected)
        assert int(w.count_nonzero()) == 5
    with torch.no_grad():
        w = nn.Parameter(torch.randn(4, 6, device=device))
        assert int(lap_ext.prune_(None, w, None, keep=5).sum()) == 5


def test_bn_scale() -> None:
    """gamma / sqrt(var + eps) in float64, for every batch norm, trained or not affine."""
    for bn in (nn.BatchNorm1d(3), nn.BatchNorm2d(3, eps=0.1), nn.BatchNorm3d(3, affine=False)):
        bn.running_var.copy_(torch.tensor([4.0, 0.25, 9.0]))
        gamma = torch.ones(3, dtype=torch.float64)
        if bn.weight is not None:
            nn.init.uniform_(bn.weight, -1, 1)
            gamma = bn.weight.detach().double()
        expected = gamma / oracle.root(bn.running_var.double() + bn.eps)
        got = lap_ext.bn_scale(bn)
        assert torch.equal(got, expected) and got.dtype == torch.float64


def test_bn_scale_is_the_batch_norm() -> None:
    """In evaluation mode the batch norm multiplies a unit vector by exactly that."""
    bn = nn.BatchNorm1d(4).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    nn.init.normal_(bn.weight)
    bn = bn.double()
    step = bn(torch.eye(4, dtype=torch.float64)) - bn(torch.zeros(1, 4, dtype=torch.float64))
    assert torch.allclose(step.diagonal(), lap_ext.bn_scale(bn), rtol=1e-12, atol=0)
