# SPDX-License-Identifier: MIT
"""Structures at their borders: patterns on the way, layers without weights, exact worths."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.ops.transposable import transposable
from lap_ext.pruning.plan import pattern_at
from lap_ext.structures import NM, Block, Groups


def chain(*sizes: int, seed: int = 0) -> nn.Sequential:
    """Linear layers in float64, without biases."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("of", [2, 3, 5, 6, 7, 10, 12, 49, 100])
def test_a_pattern_ends_at_its_own_sparsity(of: int) -> None:
    for keep in range(1, of + 1):
        for sparsity in (NM(keep, of).sparsity, (of - keep) / of, 1 - keep / of):
            assert pattern_at(NM(keep, of), sparsity) == NM(keep, of)
        if keep < of:  # a little less removes one less
            assert pattern_at(NM(keep, of), (of - keep) / of - 1e-6) == NM(keep + 1, of)


@pytest.mark.parametrize("sparsity", [0.6, float("nan"), -1.0])
def test_a_pattern_has_no_other_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity"):
        pattern_at(NM(2, 4), sparsity)


@pytest.mark.parametrize("seed", range(8))
def test_infinite_scores_have_a_transposable_pattern(seed: int) -> None:
    torch.manual_seed(seed)
    for keep, of in ((2, 3), (2, 5), (3, 6)):
        scores = torch.rand(of, of)
        scores[torch.rand(of, of) < 0.4] = torch.inf
        for live in (None, torch.rand(of, of) < 0.7):
            structure = NM(keep, of, transposable=True)
            mask = lap_ext.topk_mask(scores, structure=structure, mask=live)
            most = [mask.sum(dim).max() <= keep for dim in (0, 1)]
            assert all(most) and (live is not None or int(mask.sum()) == keep * of)


def test_a_tile_does_not_depend_on_others() -> None:
    """Files give them in chunks."""
    torch.manual_seed(0)
    sizes = torch.tensor([1e300, 1e-24, 1.0], dtype=torch.float64)
    tiles = torch.rand(3, 8, 8).double() * sizes[:, None, None]
    alone = [transposable(tile, 3) for tile in tiles.split(1)]
    assert torch.equal(transposable(tiles, 3), torch.cat(alone))


def test_patterns_among_those_of_an_earlier_round_are_full() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32))
    result = lap_ext.prune(net, torch.ones(1, 32), structure="2:4/transposable", rounds=2)
    mask = result.masks["0"]
    assert mask.sum(0).tolist() == mask.sum(1).tolist() == [16] * 32


@pytest.mark.parametrize(
    "options",
    [{}, {"criterion": "magnitude"}, {"scope": "global"}, {"rounds": 2}]
    + [{"scope": "global", "normalize": x} for x in ("none", "norm")],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:All scores are 0")
def test_layers_without_weights(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 4))
    result = lap_ext.prune(net, torch.ones(1, 4), 0.5, structure="row", **options)
    assert [row.units for row in result.layers] == [(0, 0), (0, 0), (2, 4)]


def test_too_few_units_for_a_multiple_are_all_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 5, bias=False))
    net[0].weight.data[:3] = 0
    result = lap_ext.prune(net, torch.ones(1, 4), 0.8, structure="row", multiple_of=4)
    assert result.layers[0].units == (2, 5)
    result = lap_ext.prune(net, torch.ones(1, 4), 0.9, structure="row", multiple_of=4, min_keep=0)
    assert result.layers[0].units == (0, 5)


def test_a_zero_in_a_kept_row_is_a_weight_if_zeros_are() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False))
    net[0].weight.data.copy_(torch.tensor([[9.0, 0.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]]))
    options: dict[str, Any] = {"structure": "row", "apply": False}
    kept = lap_ext.prune(net, torch.ones(1, 4), 0.5, masks={}, **options).masks["0"]
    assert kept.tolist() == [[True] * 4, [False] * 4]
    kept = lap_ext.prune(net, torch.ones(1, 4), 0.5, **options).masks["0"]
    assert kept.tolist() == [[True, False, True, True], [False] * 4]


def test_scores_that_are_no_numbers_are_refused() -> None:
    scores = torch.tensor([[torch.nan, 1.0, 2.0, 3.0]])
    for structure in (Groups([[0, 1], [2, 3]]), Block(1, 2)):
        with pytest.raises(ValueError, match="NaN"):
            lap_ext.topk_mask(scores, keep=2, structure=structure)


@pytest.mark.parametrize("groups", [Groups({}), Groups(lambda *_: None)])
def test_groups_of_no_layer(groups: Groups) -> None:
    with pytest.raises(ValueError, match="groups for one of the layers at least"):
        lap_ext.prune(chain(4, 4), torch.ones(1, 4).double(), 0.5, structure=groups)


def test_numbers_without_weights_are_no_groups() -> None:
    net = chain(4, 2)
    groups = Groups({"0": torch.tensor([[0, 0, 5, 5], [7, 7, 7, 7]])})
    result = lap_ext.prune(net, torch.ones(1, 4).double(), 0.5, structure=groups, multiple_of=3)
    assert result.layers[0].units == (3, 3)  # one bundle at least: all


def test_numbers_without_weights_have_no_exact_worth() -> None:
    w, w_prev = torch.tensor([[1.0, 1.0, 3.0, -3.0]]), torch.ones(4, 2)
    for numbers in ([[0, 0, 1, 1]], [[0, 0, 3, 3]]):
        groups = Groups(torch.tensor(numbers))
        kept = lap_ext.mask(w_prev, w, None, keep=2, structure=groups, aggregate="exact")
        assert kept.tolist() == [[True, True, False, False]]


# --- exact ----------------------------------------------------------------------------------------


def changes(net: nn.Sequential, mask: Tensor) -> float:
    """How much the three layers' product changes without the weights in mask."""
    first, second, third = (layer.weight.detach() for layer in net)
    return float((third @ (second * mask) @ first).norm())


@pytest.mark.parametrize("structure", ["row", "column", "2x3"])
def test_exact_is_the_change_of_the_product(structure: str) -> None:
    net = chain(5, 6, 4, 3)
    options: dict[str, Any] = {"structure": structure, "aggregate": "exact", "layers": ["1"]}
    example = torch.ones(1, 5).double()
    kept = lap_ext.prune(net, example, 0.5, apply=False, **options).masks["1"]
    rows, cols = {"row": (1, 6), "column": (4, 1), "2x3": (2, 3)}[structure]
    worth = {}
    for top in range(0, 4, rows):
        for left in range(0, 6, cols):
            unit = torch.zeros(4, 6)
            unit[top : top + rows, left : left + cols] = 1
            worth[top, left] = changes(net, unit)
    best = sorted(worth, key=lambda x: -worth[x])[: int(kept.sum()) // (rows * cols)]
    assert {(t, c) for t, c in worth if kept[t, c]} == set(best) and best


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"order": "forward"}, {"rounds": 2}])
def test_exact_in_files(options: dict[str, Any], tmp_path: Path) -> None:
    """All layers are ranked before a neighbor is pruned, wherever weights live."""
    net, example = chain(6, 8, 7, 5), torch.ones(1, 6).double()
    (tmp_path / "dense").mkdir()
    save_file(net.state_dict(), tmp_path / "dense" / "model.safetensors")
    given: dict[str, Any] = {"structure": "row", "aggregate": "exact", **options}
    files = tmp_path / "dense", tmp_path / "out"
    got = checkpoint.prune(*files, 0.5, model=net, example_inputs=example, **given)
    assert got.masks == lap_ext.prune(net, example, 0.5, **given).masks
