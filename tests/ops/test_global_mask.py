# SPDX-License-Identifier: MIT
"""One ranking over the weights of several layers: the masks are those of all their scores."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.errors import calling
from lap_ext.ops import schema

NARROW = (torch.float32, torch.bfloat16, torch.float16)
NONE = torch.zeros(0, dtype=torch.float64)
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]


def lists(dtypes: tuple[torch.dtype, ...], spread: float, steps: float, stored: float) -> Lists:
    """Random layers: w, norms of rows, norms of columns, groups. Norms vary by 2^spread, values are
    multiples of steps (0: any), some layers are stored scores."""
    w: list[Tensor] = []
    rows, cols, groups = [], [], []
    for _ in range(random.randint(1, 6)):
        count = random.choice([1, 1, 2, 3])
        r, c = count * random.randint(1, 40), random.randint(1, 60)
        x = torch.randn(r, c, *random.choice([(), (3, 3), (1,)])).to(random.choice(dtypes))
        if random.random() < 0.3:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        row, col = torch.rand(r, dtype=torch.float64), torch.rand(count * c, dtype=torch.float64)
        if steps:
            x, row, col = ((y / steps).round() * steps for y in (x, row, col))
        row *= 2 ** random.uniform(-spread, spread)
        col *= (torch.rand(count * c) > 0.1).double() * 2 ** random.uniform(-spread, spread)
        if random.random() < stored:
            x = x.abs().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            x[0, 0] = torch.inf
            row, col, count = NONE, NONE, 1
        w.append(x)
        rows.append(row)
        cols.append(col)
        groups.append(count)
    return w, rows, cols, groups


@pytest.mark.parametrize("dtypes", [NARROW, (torch.float64,)], ids=["narrow", "float64"])
@pytest.mark.parametrize("spread", [0.0, 8.0, 70.0, 400.0])
def test_masks_are_those_of_the_scores(dtypes: tuple[torch.dtype, ...], spread: float) -> None:
    """Whatever the norms' range: far apart, products beyond float32, many ties."""
    random.seed(0)
    for trial in range(60):
        given = lists(dtypes, spread, random.choice([0, 0, 0.5]), random.choice([0, 0.4]))
        w, rows, cols, groups = given
        scores = [
            x if r.numel() == 0 else schema.score(x, c, r, g, False, True)
            for x, r, c, g in zip(w, rows, cols, groups, strict=True)
        ]
        n = sum(x.numel() for x in w)
        keep = random.choice([0, 1, n // 10, n // 2, n - 1, n, n + 5])
        masks = [torch.rand(x.shape) > 0.3 for x in w] if trial % 3 == 0 else []
        want = lap_ext.topk_mask(scores, keep=keep, mask=masks or None)
        got = schema.global_mask(*given, keep, masks, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_scores_of_a_few_bits_tie() -> None:
    """Scores near 2^-145 have four bits left: they tie as the stored ones do."""
    w = [torch.randn(50, 40) * 2.0**-22, torch.randn(60, 40) * 2.0**-22]
    rows = [torch.full((x.shape[0],), 2.0**-60, dtype=torch.float64) for x in w]
    cols = [torch.full((40,), 2.0**-63, dtype=torch.float64)] * 2
    scores = [schema.score(x, c, r, 1, False, True) for x, r, c in zip(w, rows, cols, strict=True)]
    assert 5 < len(torch.cat(scores).unique()) < 60
    want = lap_ext.topk_mask(scores, keep=2000)
    got = schema.global_mask(w, rows, cols, [1, 1], 2000, [], True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = [torch.ones(2, 3), torch.ones(2, 3)]
    w[1][1, 0] = torch.nan
    norms = [torch.ones(2, dtype=torch.float64)] * 2, [torch.ones(3, dtype=torch.float64)] * 2
    for keep in (0, 3, 12):
        with pytest.raises(ValueError, match=r"^prune: .* in w\[1\], got 1 .* at flat index 3\."):
            with calling("prune"):
                schema.call(schema.global_mask, w, *norms, [1, 1], keep, [], True)


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(9, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4)
    )


@pytest.mark.parametrize("criterion", ["lookahead", "magnitude", "wanda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_equals_its_scores(criterion: str, dtype: torch.dtype) -> None:
    model, inputs = net().to(dtype), torch.randn(5, 9).to(dtype)
    options: dict[str, Any] = {"criterion": criterion}
    if criterion == "wanda":
        options["data"] = [inputs]
    scores = lap_ext.scores(model, inputs, **options)
    kept = lap_ext.topk_mask(list(scores.values()), sparsity=0.8)
    options |= {"scope": "global", "normalize": "none", "min_keep": 0}
    masks = lap_ext.prune(model, inputs, 0.8, apply=False, **options).masks
    for mask, want in zip(masks.values(), kept, strict=True):
        assert torch.equal(mask, want)


def test_no_score_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one use are read where they are; a tied weight's scores are needed."""
    read = []
    fused = schema.global_mask

    def spied(w: list[Tensor], rows: list[Tensor], *rest: Any) -> list[Tensor]:
        read.append([(x.data_ptr(), r.numel()) for x, r in zip(w, rows, strict=True)])
        return fused(w, rows, *rest)

    monkeypatch.setattr(schema, "global_mask", spied)
    model: Any = net()
    how: dict[str, Any] = {"scope": "global", "normalize": "none", "apply": False}
    lap_ext.prune(model, torch.randn(2, 9), 0.5, **how)
    weights = [model[index].weight for index in (0, 2, 4)]
    assert read == [[(w.data_ptr(), w.shape[0]) for w in weights]]


@pytest.mark.parametrize("normalize", ["norm", "lamp"])
def test_infinite_scores_are_not_normalized(normalize: str) -> None:
    """They would become NaN or zero, and their layer the first to be removed."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e30)
        model[2].weight.mul_(1e20)
    options: dict[str, Any] = {"scope": "global", "normalize": normalize}
    with pytest.raises(ValueError, match=r"^prune, layer '0': expected finite scores for "):
        lap_ext.prune(model, torch.ones(1, 4), 0.5, **options)
    assert lap_ext.prune(model.double(), torch.ones(1, 4).double(), 0.5, **options).kept == 16


def test_errors_name_the_layer() -> None:
    model: Any = net()
    with torch.no_grad():
        model[2].weight[1, 1] = torch.inf
    options: dict[str, Any] = {"scope": "global", "criterion": "magnitude", "normalize": "none"}
    with pytest.raises(ValueError, match=r"^prune: expected finite weights in layer '2', got 1 "):
        lap_ext.prune(model, torch.randn(2, 9), 0.5, **options)
    model = net()
    model[0].double()
    model[0].register_forward_hook(lambda *call: call[2].float())
    model[0].register_forward_pre_hook(lambda *call: (call[1][0].double(),))
    with pytest.raises(TypeError, match="prune: expected all scores to share one dtype"):
        lap_ext.prune(model, torch.randn(2, 9), 0.5, **options)
