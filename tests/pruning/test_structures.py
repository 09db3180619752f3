# SPDX-License-Identifier: MIT
"""Structures in `prune`: every one with every option, against the definition unit by unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext import structures
from tests.helpers import pruned_by_structure as oracle
from tests.helpers.checkpoints import bits
from tests.helpers.pairwise import covering
from tests.helpers.structure_nets import NETS, VIEWS, statistics, topology_of, traced


def fives(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers groups of five weights that are not next to each other; the last one is smaller."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7 % count if count % 7 else torch.arange(count)).view(shape) // 5


def own(layer: Any) -> Tensor:
    """Scores that are not powers of the weights' scores of any other criterion."""
    return layer.weight.abs().exp() - 0.9


WAYS: dict[str, dict[str, Any]] = {
    "layer": {},
    "forward": {"order": "forward"},
    "backward": {"order": "backward", "rounds": 2},
    "rounds": {"rounds": 3},
}
GLOBAL: dict[str, dict[str, Any]] = {
    "lamp": {"scope": "global"},
    "norm": {"scope": "global", "normalize": "norm", "rounds": 2},
    "raw": {"scope": "global", "normalize": "none"},
}
CRITERIA: dict[str, Any] = {
    "lookahead": "lookahead",
    "magnitude": "magnitude",
    "wanda": "wanda",
    "random": lap_ext.criteria.Random(3),
    "function": own,
}
PARTITIONS = covering(
    {
        "structure": ["row", "column", "3x5", "2x2", "16x16", fives],
        "net": list(NETS),
        "criterion": list(CRITERIA),
        "way": [*WAYS, *GLOBAL],
        "sparsity": [0.5, 0.85, "dict"],
        "aggregate": ["energy", "mean"],
        "multiple_of": [1, 2, 3],
        "min_keep": [None, 0, 9, 0.1],
        "masks": ["zeros", "none", "given"],
    }
)
PATTERNS = covering(
    {
        "structure": ["2:4", "1:4/flat", "2:4/out", "2:4/transposable", "1:2/transposable"],
        "net": list(NETS),
        "criterion": list(CRITERIA),
        "way": list(WAYS),
        "aggregate": ["energy", "mean"],
        "masks": ["zeros", "none", "given"],
    }
)


def given(topology: lap_ext.Topology, how: str) -> dict[str, Tensor] | None:
    """The masks of an earlier pruning: None, no masks, or random ones that drop full rows too."""
    if how == "zeros":
        return None
    if how == "none":
        return {}
    found = {}
    for name, layer in topology.layers.items():
        mask = torch.rand(layer.shape) < 0.7
        mask[::3] = False
        found[name] = mask
    return found


def check(topology: lap_ext.Topology, want: oracle.Pruning) -> lap_ext.PruneResult:
    """Prunes as described, and compares masks and counts with the definition."""
    options = {x.name: getattr(want, x.name) for x in fields(want)}
    scored = options.pop("scored")
    del options["views"]
    if callable(want.structure):
        options["structure"] = structures.Groups(want.structure)
    got = lap_ext.prune(topology.model, None, topology=topology, apply=False, **options, **scored)
    wanted = oracle.masks(topology, want)
    assert list(got.masks) == list(wanted)
    for name, mask in wanted.items():
        assert torch.equal(got.masks[name], mask), name
    assert {row.name: row.kept for row in got.layers} == {
        k: int(x.sum()) for k, x in wanted.items()
    }
    return got


def drawn(
    case: Mapping[str, Any], directory: Path, **more: Any
) -> tuple[lap_ext.Topology, oracle.Pruning]:
    """Builds the model of a case and its options."""
    topology = topology_of(case["net"])
    options = (WAYS | GLOBAL)[case["way"]] | {"aggregate": case["aggregate"]} | more
    if case["structure"] == "2:4/transposable":
        options["rounds"] = 1  # 3:4 in between is nearly the best only
    if case["criterion"] == "wanda":
        options["scored"] = {"data": statistics(topology, directory)}
    options["masks"] = given(topology, case["masks"])
    criterion = CRITERIA[case["criterion"]]
    return topology, oracle.Pruning(case["structure"], criterion=criterion, views=VIEWS, **options)


def spelled(case: Mapping[str, Any]) -> str:
    return "-".join(getattr(x, "__name__", str(x)) for x in case.values())


@pytest.mark.filterwarnings("ignore:.* does not fit some layers:UserWarning")
@pytest.mark.parametrize("case", PATTERNS, ids=spelled)
def test_patterns(case: Mapping[str, Any], tmp_path: Path) -> None:
    got = check(*drawn(case, tmp_path))
    assert all(row.units is None for row in got.layers)


@pytest.mark.filterwarnings("ignore:.*no weight:UserWarning")
@pytest.mark.parametrize("case", PARTITIONS, ids=spelled)
def test_partitions(case: Mapping[str, Any], tmp_path: Path) -> None:
    more = {name: case[name] for name in ("sparsity", "multiple_of", "min_keep")}
    if case["sparsity"] == "dict":
        names = list(traced(case["net"]).layers)
        more["sparsity"] = dict(zip(names[::2], [0.3, 0.6, 0.8] * 2, strict=False))
    topology, want = drawn(case, tmp_path, **more)
    try:
        got = check(topology, want)
    except ValueError as error:
        assert "a min_keep that the sparsity leaves room for" in str(error)
        with pytest.raises(oracle.NoRoomError):
            oracle.masks(topology, want)
        return
    for row in got.layers:
        assert row.units is not None
        kept, count = row.units
        assert 0 <= kept <= count and (kept > 0) == (row.kept > 0)


@pytest.mark.filterwarnings("ignore:.* does not fit some layers:UserWarning")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "structure", ["2:4", "1:4/flat", "2:4/out", "2:4/transposable", "row", "column", "2x2", fives]
)
def test_ties(structure: Any, net: str) -> None:
    """Two values of weights: of equal units, and of equal weights, the first ones are kept."""
    sparsity = None if isinstance(structure, str) and ":" in structure else 0.6
    topology = topology_of(net, levels=2)
    for way in ({}, {"scope": "global", "normalize": "none"}) if sparsity else ({},):
        check(topology, oracle.Pruning(structure, sparsity, "magnitude", views=VIEWS, **way))


@pytest.mark.parametrize("structure", ["row", "3x5", fives])
def test_shares_of_layers(structure: Any) -> None:
    """An allocation gives each layer as many weights as it does without a structure, at most."""
    topology = topology_of("convolutions", zeros=0)
    sparsity = lap_ext.erk(0.6)
    options: dict[str, Any] = {"topology": topology, "apply": False}
    single = lap_ext.prune(topology.model, None, sparsity, **options)
    shares = {row.name: 1 - row.kept / row.total for row in single.layers}
    assert len({*shares.values()}) > 3
    given = structures.Groups(structure) if callable(structure) else structure
    got = lap_ext.prune(topology.model, None, sparsity, structure=given, **options)
    assert got.masks == check(topology, oracle.Pruning(structure, shares)).masks


def test_at_least_one_unit() -> None:
    """None is one unit of each layer; 0 is none, with a warning; a number is rounded up."""
    topology = topology_of("convolutions", zeros=0)

    def units(**options: Any) -> list[Any]:
        options |= {"topology": topology, "structure": "row", "apply": False}
        return [row.units for row in lap_ext.prune(topology.model, None, 0.999, **options).layers]

    sizes = [8, 16, 16, 8, 12, 8]  # 27, 36, 9, 32, 8 and 12 weights each
    for scope in ("layer", "global"):
        assert units(scope=scope) == [(1, n) for n in sizes]
        assert sum(n for n, _ in units(scope=scope, min_keep=0)) == 0
    assert units(min_keep=28) == [(2, 8), (1, 16), (4, 16), (1, 8), (4, 12), (3, 8)]
    assert units(min_keep=28, multiple_of=3) == [(3, 8), (3, 16), (6, 16), (3, 8), (6, 12), (3, 8)]


def test_layers_of_zeros() -> None:
    """They stay as they are, or with masks={} their first units are kept."""
    topology = topology_of("convolutions", zeros=0)
    with torch.no_grad():
        topology.layers["11"].weight.zero_()
        topology.layers["0"].weight[:6] = 0
    options: dict[str, Any] = {"topology": topology, "apply": False, "structure": "row"}
    options["criterion"] = "magnitude"
    got = lap_ext.prune(topology.model, None, 0.5, **options)
    assert got.left_dense == {"11": "all zero"} and got.layers[0].units == (2, 8)
    for sparsity, way in ((0.25, {}), (0.1, {"scope": "global"})):
        got = check(topology, oracle.Pruning("row", sparsity, "magnitude", masks={}, **way))
        rows = {row.name: row for row in got.layers}
        if not way:
            assert rows["0"].units == (6, 8) and rows["0"].nonzero == 2 * 27
            kept = got.masks["0"].flatten(1).any(1)
            assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7]
            assert rows["11"].units == (9, 12) and got.masks["11"][:9].all()


# --- what does not fit ----------------------------------------------------------------------------

MISFITS = {
    "0": "2:4: 4 does not divide its 3 inputs",
    "5": "2:4: 4 does not divide its 1 inputs in each group",
}


def test_layers_that_a_pattern_does_not_fit() -> None:
    topology = topology_of("convolutions", zeros=0)
    options: dict[str, Any] = {"topology": topology, "structure": "2:4"}
    before = state(topology)
    with pytest.raises(ValueError, match=r"layers that 2:4 fits, got '0' .*'5' .*strict=True"):
        lap_ext.prune(topology.model, None, strict=True, **options)
    text = r"^2:4 does not fit some layers, which stay dense: '0' \(.*3 inputs\), '5' \(.*1 inputs"
    assert unchanged(topology, before)
    with pytest.warns(UserWarning, match=text) as caught:
        got = lap_ext.prune(topology.model, None, **options)
    assert len(caught) == 1 and got.left_dense == MISFITS
    assert {row.name: row.sparsity for row in got.layers} == dict.fromkeys(
        ["3", "7", "11", "13"], 0.5
    )
    assert all((topology.layers[name].weight != 0).all() for name in MISFITS)
    lap_ext.prune(topology.model, None, strict=True, exclude=[*MISFITS], **options)


def test_groups_of_some_layers() -> None:
    """Others stay dense without a warning, since nobody has given groups for them."""
    topology = topology_of("convolutions", zeros=0)
    groups = {"11": torch.arange(96).view(12, 8) // 12}
    options: dict[str, Any] = {"topology": topology, "apply": False}
    got = lap_ext.prune(topology.model, None, 0.5, structure=structures.Groups(groups), **options)
    assert [(row.name, row.units) for row in got.layers] == [("11", (4, 8))]
    assert got.left_dense == {name: "no groups given" for name in topology.layers if name != "11"}


def state(topology: lap_ext.Topology) -> dict[str, Tensor]:
    """Copies the bits of all parameters."""
    return {name: bits(x).clone() for name, x in topology.model.named_parameters()}


def unchanged(topology: lap_ext.Topology, before: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(bits(x), before[k]) for k, x in topology.model.named_parameters())


def numbered(number: int) -> structures.Groups:
    return structures.Groups(lambda name, shape: torch.full(shape, number))


ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "sparsity": (0.5, {"structure": "2:4"}, "no sparsity with structure='2:4', which itself says"),
    "no_sparsity": (None, {"structure": "row"}, "sparsity, the fraction to remove, got none"),
    "global": (None, {"structure": "2:4", "scope": "global"}, "no scope= with structure='2:4'"),
    "min_keep": (None, {"structure": "2:4", "min_keep": 4}, "no min_keep= with structure='2:4'"),
    "multiple": (None, {"structure": "2:4", "multiple_of": 2}, "no multiple_of= with structure="),
    "alone": (0.5, {"multiple_of": 2}, "structure= with multiple_of=, which is about"),
    "strict": (0.5, {"strict": True}, "structure= with strict=, which is about"),
    "mean": (0.5, {"aggregate": "mean"}, "structure= with aggregate=, which is about"),
    "aggregate": (0.5, {"structure": "row", "aggregate": "sum"}, "aggregate"),
    "zero": (0.5, {"structure": "row", "multiple_of": 0}, "multiple_of >= 1"),
    "text": (0.5, {"structure": "rows"}, "structure to be 'N:M'"),
    "kind": (0.5, {"structure": 4}, "structure to be a text"),
    "more": (None, {"structure": "4:2"}, "1 <= N <= M"),
    "none": (0.5, {"structure": "0x4"}, "rows >= 1"),
    "wide": (None, {"structure": "1:64"}, "layers that 1:64 fits"),
    "floors": (
        *(0.95, {"structure": "row", "scope": "global", "min_keep": 0.3}),
        "a min_keep that the sparsity leaves room for",
    ),
    "negative": (0.5, {"structure": numbered(-1)}, "a group, numbered from 0 on"),
    "large": (0.5, {"structure": numbered(10**6)}, "group numbers below"),
    "overlap": (
        *(0.5, {"structure": structures.Groups({"11": [[0, 1], [1, 2]]})}),
        "layer '11': expected groups that do not overlap",
    ),
    "left": (
        *(0.5, {"structure": structures.Groups({"11": [[0, 1]]})}),
        "layer '11': expected a group for every weight, got 94 without one",
    ),
    "name": (0.5, {"structure": structures.Groups({"12": [[0]]})}, "groups of the model's layers"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    """One that says what is wrong, before anything changes."""
    sparsity, options, text = ERRORS[name]
    topology = topology_of("convolutions", zeros=0)
    before = state(topology)
    with pytest.raises((ValueError, TypeError), match=text):
        lap_ext.prune(topology.model, None, sparsity, topology=topology, **options)
    assert unchanged(topology, before)


def test_a_layer_that_becomes_zero() -> None:
    """What a unit holds becomes +0.0, and nothing else changes."""
    topology = topology_of("sequence", zeros=0)
    before = {name: x.detach().clone() for name, x in topology.model.named_parameters()}
    got = lap_ext.prune(topology.model, None, 0.5, topology=topology, structure="2x2")
    masks = {topology.layers[name].parameter: mask for name, mask in got.masks.items()}
    for name, x in topology.model.named_parameters():
        mask = masks.get(name, torch.ones_like(x, dtype=torch.bool))
        assert torch.equal(bits(x), bits(torch.where(mask, before[name], 0.0))), name


def test_an_embedding() -> None:
    """Its inputs are entries, stored as rows: "column" removes entries, "row" channels."""
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(
            torch.tensor([1.0, 6, 2, 5, 3, 4])[:, None] * torch.tensor([4, 1, 3, 2])
        )
    options: dict[str, Any] = {"layers": ["0"], "criterion": "magnitude", "apply": False}
    inputs = torch.zeros(1, dtype=torch.int64)
    for structure, kept in (("column", [1, 3, 5]), ("row", [0, 2])):
        got = lap_ext.prune(net, inputs, 0.5, structure=structure, **options).masks["0"]
        other = got.any(1) if structure == "column" else got.any(0)
        assert other.nonzero().flatten().tolist() == kept and int(got.sum()) == 12
