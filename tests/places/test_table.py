# SPDX-License-Identifier: MIT
"""One table: every criterion, scope, normalization, order and dtype, with the same masks anywhere.

A cell is pruned four times: in memory, in a checkpoint directory with room for everything, in one
with the least memory that it takes, and in a place whose chunks are cut at every row (`Cut`). All
pairs of two columns are in the table, and all triples of scope, normalization and order.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import pruning
from lap_ext.criteria import Criterion, Norms, Wanda, WeightGradient
from lap_ext.criteria.context import Network
from lap_ext.errors import LapValueError
from lap_ext.places import Chunk
from lap_ext.topology.roles import Role
from tests.helpers import pruning_oracle
from tests.helpers.checkpoints import least_memory, write
from tests.helpers.cut_place import Cut, every_row, masks_of, ragged
from tests.helpers.place_nets import CASES, MIXED, model_of, state_of, topology_of, traced

SPARSITY = 0.4


class OwnWeight(Criterion):
    """Weights that stand first in a row of three count twice and so on."""

    name = "own_weight"

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Returns the weight times 1, 2 or 3, by its place in the layer."""
        index = torch.arange(chunk.first, chunk.first + chunk.weight.numel())
        return chunk.weight * (index % 3 + 1).reshape(chunk.weight.shape)


class OwnNorms(Criterion):
    """Only the inputs' neighbors count, and every second output twice."""

    name = "own_norms"

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, 1 or 2)."""
        into, out = network.norms(role)
        return into, 1 + torch.arange(out.numel(), dtype=torch.float64) % 2


def own_function(layer: lap_ext.Layer) -> Tensor:
    return (layer.weight.float() + 0.1) ** 2


CRITERIA: dict[str, Any] = {
    **{x: x for x in ("lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn")},
    "random": "random",
    "wanda": Wanda(),
    "wanda of layers": Wanda(per_row=False),
    "lookahead_act": "lookahead_act",
    "weight_gradient": WeightGradient(lambda model, batch: model(batch).square().sum()),
    "function": own_function,
    "own weight": OwnWeight(),
    "own norms": OwnNorms(),
}
ON_DATA = {"wanda", "wanda of layers", "lookahead_act", "weight_gradient"}
KINDS = ["float32", "float64", "float16", "bfloat16", *MIXED]
NETS = ["mlp", "convolutions", "tied", "attention", "packed"]
HOWS = [
    *itertools.product(["layer"], ["none", "norm", "lamp"], ["parallel", "forward", "backward"]),
    *itertools.product(["global"], ["none", "norm", "lamp"], ["parallel"]),
]


class Cell(NamedTuple):
    """A row of the table."""

    criterion: str
    scope: str
    normalize: str
    order: str
    rounds: int
    kind: str
    net: str

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace(" ", "_")

    @property
    def options(self) -> dict[str, Any]:
        names = ("scope", "normalize", "order", "rounds")
        return {name: getattr(self, name) for name in names} | {
            "criterion": CRITERIA[self.criterion],
            "layers": "*",
        }

    @property
    def refused(self) -> bool:
        """Raw scores of float32 and float64 are not compared."""
        return (self.scope, self.normalize, self.kind) == ("global", "none", "mixed64")

    @property
    def covered(self) -> set[tuple[Any, ...]]:
        """The pairs of columns, and the triple with the rounds."""
        pairs = itertools.combinations(enumerate(self), 2)
        return {*pairs, (self.scope, self.normalize, self.order, self.rounds)}


def table() -> list[Cell]:
    """Chooses cells, the one that covers most of some random ones, until all pairs are covered."""
    every = [
        Cell(criterion, *how, rounds, kind, net)
        for criterion in CRITERIA
        for how in HOWS
        for rounds in (1, 2)
        for kind in KINDS
        for net in NETS
    ]
    every = [cell for cell in every if not cell.refused]
    left = set().union(*(cell.covered for cell in every))
    source, cells = random.Random(0), []
    while left:
        drawn = source.sample(every, 40)
        best = max(drawn, key=lambda cell: len(cell.covered & left))
        if best.covered & left:
            cells.append(best)
            left -= best.covered
    return cells


class Directory(NamedTuple):
    """A model, the same one in files, and what criteria have measured on it."""

    model: nn.Module
    topology: lap_ext.Topology
    path: Path
    statistics: dict[str, Path]


Directories = Callable[[str, str], Directory]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Directories]:
    """Writes each model once, and traces it once for all calls of checkpoint.prune."""
    made: dict[tuple[str, str], Directory] = {}
    structures: dict[Path, Any] = {}
    statistics: dict[str, dict[str, Path]] = {}
    structure_of = pruning.structure_of
    root = tmp_path_factory.mktemp("models")

    def known(files: Any, *how: Any) -> Any:
        if files.path not in structures:
            structures[files.path] = structure_of(files, *how)
        return structures[files.path]

    def make(net: str, kind: str) -> Directory:
        if net not in statistics:
            statistics[net] = measured(net, root)
        if (net, kind) not in made:
            model = model_of(net, kind)
            path = write(root / f"{net} {kind}", state_of(model))
            topology = topology_of(net, model)
            made[net, kind] = Directory(model, topology, path, statistics[net])
        return made[net, kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "structure_of", known)
        yield make


def batches(net: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = CASES[net].inputs.shape
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def measured(net: str, root: Path) -> dict[str, Path]:
    """Writes what each criterion measures on a model."""
    paths = {}
    model = model_of(net)
    for name in sorted(ON_DATA):
        how = CRITERIA[name], batches(net)
        found = lap_ext.criteria.measure(model, CASES[net].inputs, *how, topology=traced(net))
        paths[name] = root / f"{net} {name}.safetensors"
        save_file({key: x.contiguous() for key, x in found.items()}, paths[name])
    return paths


def data_of(cell: Cell, directory: Directory) -> Path | None:
    return directory.statistics[cell.criterion] if cell.criterion in ON_DATA else None


def in_memory(cell: Cell, directory: Directory) -> Mapping[str, Tensor]:
    options = cell.options | {"data": data_of(cell, directory)}
    topology = directory.topology
    return lap_ext.prune(
        directory.model, None, SPARSITY, topology=topology, apply=False, **options
    ).masks


def in_files(
    cell: Cell, directory: Directory, out: Path, memory: int | str
) -> Mapping[str, Tensor]:
    options = cell.options | {"data": data_of(cell, directory)}
    model = {"model": model_of(cell.net), "example_inputs": CASES[cell.net].inputs}
    return checkpoint.prune(directory.path, out, SPARSITY, memory=memory, **model, **options).masks


def with_the_least(cell: Cell, directory: Directory, tmp_path: Path) -> Mapping[str, Tensor]:
    """Prunes with the least memory that is enough."""
    memory = least_memory(lambda x: in_files(cell, directory, tmp_path / "0", x))
    while True:
        try:
            return in_files(cell, directory, tmp_path / "least", memory)
        except LapValueError as error:
            assert error.argument == "memory" and "room for a full layer" in error.expected
            memory += memory // 4


def in_chunks(cell: Cell, directory: Directory) -> Mapping[str, Tensor]:
    number = len(str(cell))
    cuts = (every_row, ragged)[number % 2]
    room = {"pieces": (1, 7, 1 << 20)[number % 3], "capacity": (3, 1000)[number % 2]}
    fits = cell.criterion == "function" or cell[::6] == ("wanda", "convolutions")
    place = Cut(directory.topology, cuts, fits=fits, **room)
    return masks_of(place, SPARSITY, data_of(cell, directory), **cell.options)


def check_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, mask in want.items():
        wrong = (got[name] != mask).nonzero()
        assert got[name].shape == mask.shape and not wrong.numel(), (name, wrong[:5])


@pytest.mark.filterwarnings("ignore:.*scores are 0:UserWarning")
@pytest.mark.filterwarnings("ignore:.*no weight:UserWarning")
@pytest.mark.parametrize("cell", table(), ids=str)
def test_masks_are_the_same(cell: Cell, directories: Directories, tmp_path: Path) -> None:
    directory = directories(cell.net, cell.kind)
    want = in_memory(cell, directory)
    assert any(not mask.all() for mask in want.values())
    check_equal(in_files(cell, directory, tmp_path / "all", "4GB"), want)
    check_equal(with_the_least(cell, directory, tmp_path), want)
    check_equal(in_chunks(cell, directory), want)
