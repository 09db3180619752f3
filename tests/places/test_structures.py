# SPDX-License-Identifier: MIT
"""Structures over every place: the bits of memory, wherever a layer is cut or a run is stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lap_ext
from lap_ext import structures
from lap_ext.errors import LapValueError
from lap_ext.structures import Groups
from tests.helpers.checkpoints import INPUTS, network, prune, write
from tests.helpers.checkpoints import least_memory as least_of
from tests.helpers.cut_place import Cut, Cuts, masks_of
from tests.helpers.file_places import files_of, least_memory
from tests.helpers.interrupted import SHARDS, WORK, contents, facts, interrupt
from tests.helpers.one_trace import one_trace
from tests.helpers.place_nets import CASES, model_of, topology_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not fit some layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no weight:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*scores are 0:UserWarning"),
]

FIVES = Groups(lambda name, shape: torch.arange(torch.Size(shape).numel()).view(shape) // 5)
PATTERNS = [
    *("2:4", "1:2", "1:3", "2:4/out", "1:2/out", "3:4/flat", "4:6/flat"),
    *("2:4/transposable", "1:2/transposable", "3:4/transposable"),
]
PARTITIONS: list[Any] = ["row", "column", "3x5", "2x2", "16x16", FIVES]
OWN: list[dict[str, Any]] = [
    {},
    {"criterion": "magnitude"},
    {"order": "backward"},
    {"order": "forward", "rounds": 2},
    {"rounds": 2},
]
TOGETHER: list[dict[str, Any]] = [
    {"scope": "global", "normalize": "none", "multiple_of": 2},
    {"scope": "global", "normalize": "norm", "rounds": 2, "aggregate": "mean"},
    {"scope": "global", "normalize": "lamp", "min_keep": 0.05},
]


def in_memory(topology: lap_ext.Topology, sparsity: float | None, **how: Any) -> Any:
    """The masks that any place must give; None where no layer has the structure."""
    try:
        return lap_ext.prune(
            topology.model, None, sparsity, topology=topology, apply=False, layers="*", **how
        )
    except LapValueError as error:
        assert "layers that" in str(error) or "leaves room for" in str(error), error
        return None


def check(got: dict[str, Tensor], want: Any) -> None:
    assert list(got) == list(want.masks)
    for name, mask in want.masks.items():
        assert torch.equal(got[name], mask), name


row_sets = st.sets(st.integers(0, 25), max_size=12)


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(CASES)),
    st.sampled_from([*PATTERNS, *PARTITIONS]),
    st.integers(0, 7),
    st.tuples(row_sets, st.sampled_from([(0,), (2, 3, 7), (4, 12)])),
    st.booleans(),
    st.sampled_from([1, 7, 1 << 30]),
    st.sampled_from([0, 2, 40]),
    st.sampled_from([0, 1]),
)
def test_cuts(
    net: str,
    structure: Any,
    way: int,
    where: tuple[set[int], tuple[int, ...]],
    fits: bool,
    pieces: int,
    capacity: int,
    levels: int,
) -> None:
    """Chunks of any rows that a pattern does not need at once, in slices that need not align."""
    how = [*OWN, *TOGETHER][way]
    pattern = structure in PATTERNS
    assume(not (pattern and way >= len(OWN)))
    topology = topology_of(net, model_of(net, levels=levels))
    sparsity, how = None if pattern else 0.6, {"structure": structure, **how}
    want = in_memory(topology, sparsity, **how)
    assume(want is not None)
    room: dict[str, Any] = {"fits": fits, "pieces": pieces, "capacity": capacity}
    slices: Cuts = lambda layer: where[1]  # noqa: E731
    place = Cut(topology, lambda layer: where[0], slices=slices, structure=structure, **room)
    try:
        got = masks_of(place, sparsity, layers="*", **how)
    except LapValueError as error:
        if "full layer" in str(error):
            assert pattern and not fits and where[1] != (0,)
        else:
            assert "worth of all units" in str(error) and capacity < 40
            assert not fits or how.get("scope") == "global"
        return
    check(got, want)


FILES: list[Any] = ["2:4", "1:2/out", "4:6/flat", "1:2/transposable", "row", "3x5", FIVES]


@pytest.mark.parametrize("structure", FILES, ids=str)
@pytest.mark.parametrize("net", ["mlp", "convolutions"])
@pytest.mark.parametrize("parted", [False, True])
def test_files(net: str, structure: Any, parted: bool, tmp_path: Path) -> None:
    """The least budget and a large one; slices that part what a pattern sees at once."""
    topology, slices = topology_of(net, model_of(net)), (lambda _: [2, 3, 7] * parted)
    pattern = structure in PATTERNS
    sparsity = None if pattern else 0.6
    how = {"structure": structure, "rounds": 2}
    want = in_memory(topology, sparsity, **how)
    assert want is not None
    least = least_memory(topology, tmp_path, slices, structure)
    for memory in (least, "4GB"):
        with files_of(topology, tmp_path, memory, slices, structure=structure) as place:
            whole = all(place.fits(layer, 36) for layer in topology.layers.values())
            try:
                got = masks_of(place, sparsity, layers="*", **how)
            except LapValueError as error:
                full = f"room for a full layer, whose files part rows that {structure} sees at once"
                text = full if pattern and parted else "room for the worth of all units in memory"
                assert not whole and text in str(error)
                continue
            check(got, want)


# --- runs that are stopped ------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "1:2": {"sparsity": None},
    "1:5/out": {"sparsity": None, "rounds": 2, "layers": ["0", "3"]},
    "1:2/flat": {"sparsity": None, "order": "forward"},
    "row": {"rounds": 2},
    "column": {"scope": "global", "memory": "4GB"},
    "9x9": {"memory": "4GB"},  # each layer is ranked when it is written
    "2x6": {"order": "backward", "memory": "4GB"},
    "7x16": {"scope": "global", "rounds": 2, "normalize": "norm", "multiple_of": 2},
}


@pytest.mark.parametrize("structure", RUNS)
def test_a_run_that_is_stopped_goes_on(
    structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of rounds and of shards: every file, and the units of the table, are the same.

    The least budget holds rows of a few weights; it grows until the worth of all units fits.
    """
    one_trace(monkeypatch)
    source = write(tmp_path / "dense", network().state_dict(), SHARDS)
    how = {"sparsity": 0.6, "structure": structure, **RUNS[structure]}
    budget = how.pop("memory", None) or _budget(source, how)
    full = prune(source, tmp_path / "full", memory=budget, **how)
    want = lap_ext.prune(network(), INPUTS, **how)
    assert full.masks == want.masks and list(full.layers) == list(want.layers)
    again = "rounds" in how or "order" in how
    for step, count in [("rank", 2)] * again + [("write", 5)]:
        work = interrupt(source, step, count, memory=budget, **how)
        assert work.name == WORK and facts(work)
        got = prune(source, tmp_path / "out", memory=budget, **how)
        assert list(got.layers) == list(want.layers) and got.masks == want.masks
        assert contents(tmp_path / "out") == contents(tmp_path / "full")
        shutil.rmtree(tmp_path / "out")


def _budget(source: Path, how: dict[str, Any]) -> int:
    """The smallest budget that takes a pruning, in steps of a third."""
    out = source.parent / "no"
    budget = least_of(lambda few: prune(source, out, memory=few, **how))
    while True:
        try:
            prune(source, out, memory=budget, resume=False, **how)
        except LapValueError as error:
            assert "room for the worth of all units in memory" in str(error)
            budget += budget // 3
            continue
        shutil.rmtree(out)
        return budget


def test_room_for_the_worth_of_units(tmp_path: Path) -> None:
    """One error that says so, and nothing is written."""
    source = write(tmp_path / "dense", network().state_dict(), SHARDS)
    how = {"structure": "1x1", "scope": "global"}
    few = least_of(lambda few: prune(source, tmp_path / "out", memory=few, **how))
    text = (
        r"expected room for the worth of all units in memory, got 12,030 units of 3 layers\. "
        r"Raise it, or choose larger units\."
    )
    with pytest.raises(LapValueError, match=text):
        prune(source, tmp_path / "out", memory=few, resume=False, **how)
    assert [x.name for x in tmp_path.iterdir()] == ["dense"]


def test_room_for_a_full_layer(tmp_path: Path) -> None:
    """A function of a full layer needs it for a pattern, too."""
    source = write(tmp_path / "dense", network().state_dict(), SHARDS)
    how = {"structure": "1:2", "criterion": lambda layer: layer.weight.abs(), "resume": False}
    few = least_of(lambda few: prune(source, tmp_path / "out", None, memory=few, **how))
    with pytest.raises(LapValueError, match="layer '0': expected room for a full layer, which"):
        prune(source, tmp_path / "out", None, memory=few, **how)
    assert [x.name for x in tmp_path.iterdir()] == ["dense"]
    prune(source, tmp_path / "out", None, **how)


def test_a_pattern_in_rows_that_fit(tmp_path: Path) -> None:
    """A chunk has as many rows as a pattern sees at once: the least budget is larger for it."""
    topology = topology_of("mlp", model_of("mlp"))
    one = least_memory(topology, tmp_path, lambda _: [0])
    four = least_memory(topology, tmp_path, lambda _: [0], structures.NM(2, 4, "out"))
    row = 24 * (48 + 4)  # bytes of a row of the layer with the longest ones, twice
    assert four - one == 2 * 3 * row
