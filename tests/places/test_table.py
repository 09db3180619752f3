# SPDX-License-Identifier: MIT
"""One table: every criterion, scope, normalization, order and dtype, with the same masks anywhere.

A cell is pruned four times: in memory, in a checkpoint directory with room for everything, in one
with the least memory that it takes, and in a place whose chunks are cut at every row (`Cut`). All
pairs of two columns are in the table, and all triples of scope, normalization and order.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint.weights import Files
from lap_ext.criteria import Criterion, Norms, Wanda, WeightGradient
from lap_ext.criteria.context import Network
from lap_ext.errors import LapValueError
from lap_ext.places import Chunk
from lap_ext.topology.roles import Role
from tests.helpers import pruning_oracle
from tests.helpers.checkpoints import least_memory, write
from tests.helpers.cut_place import Cut, every_row, masks_of, ragged
from tests.helpers.one_trace import one_trace
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
    statistics: dict[str, dict[str, Path]] = {}
    root = tmp_path_factory.mktemp("models")

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
        one_trace(patch)
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
        found = lap_ext.criteria.measure(model, None, *how, topology=traced(net))
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


def test_the_table_is_complete() -> None:
    """All pairs of columns occur, and all triples of scope, normalization and order."""
    cells = table()
    for one, other in itertools.combinations(range(len(Cell._fields)), 2):
        found = {(cell[one], cell[other]) for cell in cells}
        lists = (CRITERIA, ["layer", "global"], ["none", "norm", "lamp"],
                 ["parallel", "forward", "backward"], [1, 2], KINDS, NETS)  # fmt: skip
        wanted = set(itertools.product(lists[one], lists[other]))
        barred = {("global", "forward"), ("global", "backward")}
        assert found == wanted - barred
    triples = {(x.scope, x.normalize, x.order, x.rounds) for x in cells}
    assert triples == {(*how, rounds) for how in HOWS for rounds in (1, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_memory_cuts_layers(
    kind: str, directories: Directories, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise the table would compare full layers with full layers."""
    sizes: dict[str, list[int]] = {}
    chunks = Files.slices

    def counted(self: Any, layer: lap_ext.Layer, slices: Any) -> Iterator[Chunk]:
        for chunk in chunks(self, layer, slices):
            sizes.setdefault(layer.name, []).append(chunk.weight.numel())
            yield chunk

    monkeypatch.setattr(Files, "slices", counted)
    for net, name in (("mlp", "3"), ("convolutions", "3"), ("packed", "both")):
        cell = Cell("lookahead", "layer", "none", "parallel", 1, kind, net)
        with_the_least(cell, directories(net, kind), tmp_path / net)
        assert len(sizes[name]) > 10


ORACLE = [
    ("layer", "none", "forward", 1),
    ("layer", "none", "backward", 2),
    ("global", "norm", "parallel", 1),
    ("global", "lamp", "parallel", 2),
]


@pytest.mark.parametrize("how", ORACLE, ids=lambda how: "-".join(map(str, how)))
@pytest.mark.parametrize("net", [*NETS, "experts"])
def test_lookahead_by_its_definition(net: str, how: tuple[str, str, str, int]) -> None:
    """The masks of brute force: zero each weight, take the norm of the change, and sort."""
    model, case = model_of(net, "float64", small=True), CASES[net]
    options: dict[str, Any] = dict(zip(("scope", "normalize", "order", "rounds"), how, strict=True))
    want = pruning_oracle.masks(model, case.inputs, 0.3, how=case.how, **options)
    topology, options["layers"] = topology_of(net, model, small=True), "*"
    got = lap_ext.prune(model, None, 0.3, topology=topology, apply=False, **options).masks
    check_equal(got, want)
    check_equal(masks_of(Cut(topology, ragged, capacity=5), 0.3, **options), want)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("min_keep", [3, 0.5])
@pytest.mark.parametrize("normalize", ["none", "lamp"])
def test_floors(
    normalize: str, min_keep: Any, kind: str, directories: Directories, tmp_path: Path
) -> None:
    """Layers whose weights are small would lose more than their floors allow."""
    directory = directories("mlp", kind)
    options: dict[str, Any] = {
        "scope": "global", "criterion": "magnitude", "normalize": normalize,
        "min_keep": min_keep, "layers": "*", "rounds": 2,
    }  # fmt: skip
    model, topology = directory.model, directory.topology
    want = lap_ext.prune(model, None, 0.5, topology=topology, apply=False, **options).masks
    check_equal(masks_of(Cut(topology), 0.5, **options), want)
    inputs = {"model": model, "example_inputs": CASES["mlp"].inputs}
    for memory in ("17KB", "4GB"):
        out = tmp_path / memory
        got = checkpoint.prune(directory.path, out, 0.5, memory=memory, **inputs, **options)
        check_equal(got.masks, want)
    without = lap_ext.prune(
        model, None, 0.5, topology=topology, apply=False, **(options | {"min_keep": 0})
    )
    assert min_keep == 3 or normalize == "lamp" or without.masks != want


@pytest.mark.parametrize("name", sorted(ON_DATA))
@pytest.mark.parametrize("net", NETS)
def test_batches_are_as_good_as_a_file(name: str, net: str, directories: Directories) -> None:
    directory = directories(net, "float32")
    options = {"criterion": CRITERIA[name], "apply": False, "layers": "*"}
    model, topology, data = directory.model, directory.topology, directory.statistics[name]
    got = lap_ext.prune(model, None, 0.4, topology=topology, data=batches(net), **options)
    want = lap_ext.prune(model, None, 0.4, topology=topology, data=data, **options)
    check_equal(got.masks, want.masks)


REFUSED: dict[str, dict[str, Any]] = {
    "global forward": {"scope": "global", "order": "forward"},
    "global backward": {"scope": "global", "order": "backward", "normalize": "none"},
    "no rounds": {"rounds": 0},
    "rounds of a half": {"rounds": 0.5},
    "an order of none": {"order": "sideways"},
    "no such criterion": {"criterion": "lookaround"},
    "a number as criterion": {"criterion": 3},
    "no data": {"criterion": "wanda"},
    "data that nothing reads": {"criterion": "lookahead", "data": "mlp wanda.safetensors"},
    "a file that is not there": {"criterion": "wanda", "data": "nothing.safetensors"},
    "statistics of another": {"criterion": "wanda", "data": "mlp weight_gradient.safetensors"},
    "statistics of others": {"criterion": "weight_gradient", "data": "tied wanda.safetensors"},
    "another shape": {"criterion": "wanda", "data": "convolutions wanda.safetensors"},
    "raw scores of two dtypes": {"scope": "global", "normalize": "none", "kind": "mixed64"},
    "a function of nothing": {"criterion": lambda layer: None},
    "scores of another shape": {"criterion": lambda layer: layer.weight[:1].abs()},
    "negative scores": {"criterion": lambda layer: layer.weight},
    "scores that are no numbers": {"criterion": lambda layer: layer.weight.abs() * torch.nan},
    "a function that fails": {"criterion": lambda layer: 1 // 0},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(options: dict[str, Any], directories: Directories, tmp_path: Path) -> None:
    """With the same kind of error, of the same argument and layer, in every place."""
    options = {"layers": "*"} | options
    directory = directories("mlp", options.pop("kind", "float32"))
    directories("tied", "float32"), directories("convolutions", "float32")
    if "data" in options:
        options["data"] = directory.statistics["wanda"].parent / options["data"]
    model, topology = directory.model, directory.topology
    inputs = {"model": model, "example_inputs": CASES["mlp"].inputs}
    calls: list[Callable[[], Any]] = [
        lambda: lap_ext.prune(model, None, 0.4, topology=topology, apply=False, **options),
        lambda: checkpoint.prune(directory.path, tmp_path / "out", 0.4, **inputs, **options),
        lambda: masks_of(Cut(topology, fits=True), 0.4, **options),
    ]
    errors = []
    for call in calls:
        with pytest.raises((ValueError, TypeError, ArithmeticError, OSError)) as caught:
            call()
        error = caught.value
        errors.append((type(error), getattr(error, "argument", ""), getattr(error, "layer", "")))
    assert errors[1:] == errors[:1] * 2
    left = [] if errors[0][0] is not ZeroDivisionError else [tmp_path / ".out.lap_ext"]
    assert list(tmp_path.iterdir()) == left  # a user's own error may not come again
