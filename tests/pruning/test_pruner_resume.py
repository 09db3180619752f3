# SPDX-License-Identifier: MIT
"""A run that was saved, rebuilt from nothing and loaded goes on as if it had never stopped.

Bit for bit: parameters, buffers, masks and what the optimizer remembers.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lap_ext
from lap_ext.pruning.pruner import Pruner
from lap_ext.schedule import cubic, iterative, linear, one_shot
from tests.helpers import masked_network as cases
from tests.helpers.pruner_training import EXAMPLE

STEPS = 20
RATIOS = {"conv": 0.5, "fc*": 0.3}


SCHEDULES: dict[str, Callable[[int], Any]] = {  # each prunes in both halves of 20 steps
    "cubic": cubic(0.9, start=2, end=17, every=3),
    "iterative": iterative(0.4, rounds=4, every=5, start=1),
    "paper": lambda step: (
        lap_ext.allocation.compounded(RATIOS, step // 5) if step in (5, 10, 15) else None
    ),
}
torch.manual_seed(3)
DATA = cases.batches(2)
OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "global": {"scope": "global", "normalize": "lamp"},
    "forward": {"order": "forward", "rounds": 2, "exclude": ["fc2"]},
    "random": {"criterion": "random"},
    "wanda": {"criterion": "wanda", "data": DATA},
    "gradient": {"criterion": "weight_gradient", "data": DATA},
}


class Run:
    """Everything that a training script builds, from nothing but a seed."""

    def __init__(
        self,
        name: str,
        schedule: str,
        options: str = "layer",
        *,
        norm: bool = False,
        alone: bool = False,
    ) -> None:
        torch.manual_seed(1)
        self.model = cases.net()
        if norm:
            self.model.act = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh())
        self.optimizer = cases.OPTIMIZERS[name](self.model.parameters())
        self.pruner = Pruner(
            self.model,
            EXAMPLE,
            SCHEDULES[schedule],
            optimizer=None if alone else self.optimizer,
            **OPTIONS[options],
        )

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "pruner": self.pruner}

    def train(self, first: int, last: int) -> Run:
        """Steps first to last - 1, each with its own batch."""
        for step in range(first, last):
            torch.manual_seed(100 + step)
            cases.train(self.model, self.optimizer, cases.batches(1))
            self.pruner.step()
            cases.check_zero(self.model, self.pruner.masks)
        return self

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, data: bytes, order: tuple[str, ...] = ("model", "optimizer", "pruner")) -> Run:
        state = read(data)
        for name in order:
            self.parts()[name].load_state_dict(state[name])
        return self


def check_same(x: Any, y: Any, path: str = "") -> None:
    """Equal to the last bit and sign, in the same order, however nested."""
    assert type(x) is type(y), path
    if isinstance(x, Tensor):
        assert x.dtype == y.dtype and torch.equal(x, y), path
        assert not x.is_floating_point() or torch.equal(x.signbit(), y.signbit()), path
    elif isinstance(x, dict):
        assert list(x) == list(y), path
        for key in x:
            check_same(x[key], y[key], f"{path}/{key}")
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y), path
        for place, pair in enumerate(zip(x, y, strict=True)):
            check_same(*pair, f"{path}/{place}")
    else:
        assert x == y, path


def read(data: bytes) -> dict[str, Any]:
    """Not the bytes: pickle writes equal strings once if they are one object, else twice."""
    return torch.load(io.BytesIO(data), weights_only=True)


def check_equal(one: Run, other: Run) -> None:
    for name, part in one.parts().items():
        check_same(part.state_dict(), other.parts()[name].state_dict(), name)
    assert one.pruner.masks == other.pruner.masks and one.pruner.result == other.pruner.result
    assert str(one.pruner.result) == str(other.pruner.result)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", ["momentum", "adamw", "adamw-fused", "rmsprop"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_resumes_bit_for_bit(name: str, schedule: str, norm: bool) -> None:
    whole = Run(name, schedule, norm=norm).train(0, STEPS // 2)
    data, half = whole.save(), whole.pruner.sparsity
    assert half > 0.3
    resumed = Run(name, schedule, norm=norm).load(data)
    check_equal(whole, resumed)
    resumed.train(STEPS // 2, STEPS)
    whole.train(STEPS // 2, STEPS)
    check_equal(whole, resumed)
    assert whole.pruner.sparsity > half, "it has pruned in both halves"


@settings(max_examples=settings.default.max_examples // 2)
@given(
    stop=st.integers(0, STEPS),
    order=st.permutations(["model", "optimizer", "pruner"]),
    name=st.sampled_from(["momentum", "adamw"]),
    schedule=st.sampled_from(list(SCHEDULES)),
    options=st.sampled_from(list(OPTIONS)),
    alone=st.booleans(),
)
def test_stopped_anywhere(
    stop: int, order: list[str], name: str, schedule: str, options: str, alone: bool
) -> None:
    """Before the first pruning, after the last; the parts loaded in any order."""
    whole = Run(name, schedule, options, alone=alone).train(0, stop)
    resumed = Run(name, schedule, options, alone=alone).load(whole.save(), tuple(order))
    check_equal(whole, resumed)
    check_equal(whole.train(stop, STEPS), resumed.train(stop, STEPS))


def test_back_to_an_earlier_state() -> None:
    """Into a pruner that has gone on: later masks are forgotten, hooks do not pile up."""
    run = Run("adamw", "iterative")
    start, early = run.save(), run.train(0, 5).save()
    later = read(run.train(5, STEPS).save())
    for data, done in ((early, 5), (start, 0), (early, 5)):
        run.load(data, ("pruner", "model", "optimizer"))
        check_same(read(run.save()), read(data))
        assert (run.pruner.result is None) == (done == 0)
        assert len(run.optimizer._optimizer_step_pre_hooks) == 1
        check_same(read(run.train(done, STEPS).save()), later)


def test_a_dense_model_becomes_pruned() -> None:
    """The masks come into force when they are loaded, on the moments too."""
    trained, run = Run("adamw", "iterative").train(0, 10), Run("adamw", "iterative")
    cases.train(run.model, run.optimizer, cases.batches(2))
    run.pruner.load_state_dict(trained.pruner.state_dict())
    masks = run.pruner.masks
    cases.check_zero(run.model, masks)
    assert not run.optimizer.state[run.model.fc1.weight]["exp_avg"][~masks["fc1"]].any()
    run.train(10, 12)
    assert run.pruner.result.layers[1].kept == trained.train(10, 12).pruner.result.layers[1].kept


# --- the state of another pruner ------------------------------------------------------------------


def stopped(schedule: Callable[[int], Any], steps: int, **options: Any) -> dict[str, Any]:
    """The state of a pruner after so many steps, as it is read from a file."""
    pruner = Pruner(cases.net(), EXAMPLE, schedule, **options)
    for _ in range(steps):
        pruner.step()
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    state: dict[str, Any] = read(file.getvalue())
    return state


def erk_at(steps: dict[int, float]) -> Callable[[int], Any]:
    return lambda step: lap_ext.erk(steps[step]) if step in steps else None


THEN, NOW = "in the state", "by this schedule"
OTHERS: dict[str, tuple[Callable[[int], Any], Callable[[int], Any], list[str]]] = {
    "another sparsity": (one_shot(0.5, at=2), one_shot(0.6, at=2), [f"2: 0.5 {THEN}, 0.6 {NOW}"]),
    "another step": (
        one_shot(0.5, at=2),
        one_shot(0.5, at=3),
        [f"2: 0.5 {THEN}, none {NOW}", f"3: none {THEN}, 0.5 {NOW}"],
    ),
    "later": (one_shot(0.5, at=2), one_shot(0.5, at=30), [f"2: 0.5 {THEN}, none {NOW}"]),
    "earlier": (one_shot(0.5, at=30), one_shot(0.5, at=2), [f"2: none {THEN}, 0.5 {NOW}"]),
    "more often": (
        cubic(0.75, start=0, end=4, every=2),
        cubic(0.75, start=0, end=4),
        [f"1: none {THEN}, 0.43359375 {NOW}", f"3: none {THEN}, 0.73828125 {NOW}"],
    ),
    "another curve": (
        linear(0.5, start=0, end=4, every=2),
        cubic(0.5, start=0, end=4, every=2),
        [f"2: 0.25 {THEN}, 0.4375 {NOW}"],
    ),
    "a dict": (
        {2: {"fc*": 0.5}}.get,
        {2: {"fc*": 0.6}}.get,
        [f"2: fc*=0.5 {THEN}, fc*=0.6 {NOW}"],
    ),
    "an allocation": (erk_at({2: 0.5}), {2: 0.5}.get, [f"2: erk:0.5 {THEN}, 0.5 {NOW}"]),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_the_state_of_another_schedule(name: str) -> None:
    """Told by what the schedules say of the steps so far; nothing is changed."""
    then, now, differences = OTHERS[name]
    model = cases.net()
    pruner = Pruner(model, EXAMPLE, now)
    with pytest.raises(ValueError) as caught:
        pruner.load_state_dict(stopped(then, 8))
    assert str(caught.value) == (
        "Pruner.load_state_dict: expected the state of a pruner with the same schedule (the same "
        f"sparsity at each of the 8 steps so far), got one that differs at {len(differences)}. "
        "Make the pruner with the schedule of then; or, to continue by another one on purpose, "
        "remove 'prunings' from the state."
        + "".join(f"\n  step {difference}." for difference in differences)
    )
    assert len(pruner.masks) == 0 and pruner.state_dict()["step"] == 0 and model.fc1.weight.all()


def test_a_schedule_that_agrees_so_far() -> None:
    """The state is one that this pruner could have reached: it goes on by its own schedule."""
    longer = iterative(0.4, rounds=9, every=5, start=1)
    state = stopped(SCHEDULES["iterative"], 8)
    for schedule in (longer, {1: 0.4, 6: 0.64, 9: 0.9}.get):
        pruner = Pruner(cases.net(), EXAMPLE, schedule)
        pruner.load_state_dict(state)
        assert pruner.sparsity == pytest.approx(0.64, abs=0.01)
    before = stopped(one_shot(0.5, at=30), 8)  # no pruning yet: it does not decide anything
    Pruner(cases.net(), EXAMPLE, one_shot(0.9, at=8)).load_state_dict(before)


def test_another_schedule_on_purpose() -> None:
    state = stopped(one_shot(0.5), 3)
    del state["prunings"]
    pruner = Pruner(cases.net(), EXAMPLE, {3: 0.75}.get)
    pruner.load_state_dict(state)
    assert pruner.step().sparsity == 0.75
    assert pruner.state_dict()["prunings"] == [[3, 0.75]]


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "scope": (
        {},
        {"scope": "global", "normalize": "none"},
        ["scope: layer in the state, global here"],
    ),
    "criterion": (
        {"criterion": "magnitude"},
        {},
        ["criterion: magnitude in the state, lookahead here"],
    ),
    "seed": (
        {"criterion": lap_ext.criteria.Random(seed=1)},
        {"criterion": lap_ext.criteria.Random(seed=2)},
        ["criterion: random(seed=1) in the state, random(seed=2) here"],
    ),
    "several": (
        {"order": "forward", "rounds": 2, "batch_norm": "ignore"},
        {"normalize": "norm", "residual": "chain"},
        [
            "normalize: none in the state, norm here",
            "order: forward in the state, parallel here",
            "rounds: 2 in the state, 1 here",
            "batch_norm: ignore in the state, edge here",
            "residual: sum in the state, chain here",
        ],
    ),
    "min_keep": ({"min_keep": 5}, {}, ["min_keep: 5 in the state, none here"]),
    "layers": (
        {},
        {"exclude": "fc2"},
        ["layers: conv, fc1, fc2 in the state, conv, fc1 here"],
    ),
}


@pytest.mark.parametrize("name", list(CHANGED))
def test_the_state_of_other_options(name: str) -> None:
    then, now, differences = CHANGED[name]
    state = stopped(one_shot(0.5), 1, **then)
    pruner = Pruner(cases.net(), EXAMPLE, one_shot(0.5), **now)
    with pytest.raises(ValueError) as caught:
        pruner.load_state_dict(state)
    assert str(caught.value) == (
        "Pruner.load_state_dict: expected the state of a pruner with the same options, got one "
        f"that differs in {len(differences)}. Make the pruner with the options of then; or, to "
        "continue with others on purpose, remove 'options' from the state."
        + "".join(f"\n  {difference}." for difference in differences)
    )
    assert len(pruner.masks) == 0
    del state["options"]
    pruner.load_state_dict(state)
    assert len(pruner.masks) == 3


def test_functions_have_no_names_that_could_differ() -> None:
    """A criterion that is a function is known by its name alone, wherever it lies in memory."""
    states = [
        stopped(one_shot(0.5), 1, criterion=lambda layer: layer.weight.abs()) for _ in range(2)
    ]
    assert states[0]["options"] == states[1]["options"]
    criterion = states[0]["options"]["criterion"]
    assert isinstance(criterion, str) and "0x" not in criterion


class Mine:
    """An allocation without a text of its own."""

    def keeps(self, shapes: Any) -> dict[str, int]:
        return dict.fromkeys(shapes, 7)


def test_allocations_without_a_text_are_known_by_their_class() -> None:
    state = stopped({0: Mine()}.get, 2)
    assert state["prunings"] == [[0, "Mine"]]
    Pruner(cases.net(), EXAMPLE, {0: Mine()}.get).load_state_dict(state)


def test_a_schedule_computed_on_another_machine() -> None:
    """The last bit of a power may differ there."""
    state = stopped(iterative(0.4, rounds=4), 3)
    state["prunings"] = [[step, math.nextafter(value, 1)] for step, value in state["prunings"]]
    Pruner(cases.net(), EXAMPLE, iterative(0.4, rounds=4)).load_state_dict(state)


def test_a_state_of_very_many_steps() -> None:
    """The schedule is asked for the last ten million steps at most, and those of the state."""
    state = stopped(one_shot(0.5), 1)
    asked = []

    def schedule(step: int) -> float | None:
        asked.append(step)
        return 0.5 if step == 0 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lap_ext.pruning.pruner_state.SCANNED", 1000)
        Pruner(cases.net(), EXAMPLE, schedule).load_state_dict({**state, "step": 10**18})
    assert asked == [0, *range(10**18 - 1000, 10**18)]


# --- what the state is ----------------------------------------------------------------------------


def test_the_state_is_small_plain_and_its_own() -> None:
    run = Run("momentum", "iterative")
    layers = {"conv": [4, 1, 3, 3], "fc1": [8, 64], "fc2": [3, 8]}
    options = {"criterion": "lookahead", "scope": "layer", "normalize": "none",
               "order": "parallel", "rounds": 1, "batch_norm": "edge", "residual": "sum",
               "min_keep": None, "structure": None, "aggregate": "energy", "multiple_of": 1,
               "cost": None, "uniform": False,
               "layers": ["conv", "fc1", "fc2"]}  # fmt: skip
    assert run.pruner.state_dict() == {
        "step": 0, "masks": {}, "structure": None,
        "layers": layers, "options": options, "prunings": [],
    }  # fmt: skip
    run.train(0, 2)
    state = run.pruner.state_dict()
    assert (state["step"], state["layers"], state["options"]) == (2, layers, options)
    assert state["prunings"] == [[1, pytest.approx(0.4)]]
    sizes = {name: (bits.dtype, bits.numel()) for name, bits in state["masks"].items()}
    assert sizes == {name: (torch.uint8, n) for name, n in (("conv", 5), ("fc1", 64), ("fc2", 3))}
    before = copy.deepcopy(state)
    run.train(2, STEPS)
    check_same(state, before)
    run.pruner.load_state_dict(state)
    run.pruner.masks["fc1"].zero_()
    check_same(state, before)


def changed(**entries: Any) -> dict[str, Any]:
    """A good state with some entries replaced."""
    return {**Run("momentum", "iterative").train(0, 2).pruner.state_dict(), **entries}


ONES = torch.ones(64, dtype=torch.uint8)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "masks of safetensors": (
        lambda: {"fc1": ONES},
        TypeError,
        r"masks and layers\), got \{'fc1': 'Tensor'",
    ),
    "nothing": (lambda: None, TypeError, "got NoneType"),
    "masks alone": (
        lambda: changed(masks=ONES),
        TypeError,
        "'masks': 'Tensor', 'structure': 'NoneType', 'layers': 'dict'",
    ),
    "layers": (lambda: changed(layers=[36]), TypeError, "'layers': 'list'"),
    "no step": (lambda: changed(step=None), ValueError, "got None"),
    "negative": (lambda: changed(step=-1), ValueError, "whole number >= 0, got -1"),
    "tensor": (lambda: changed(step=torch.tensor(3)), ValueError, r"got tensor\(3\)"),
    "another schedule": (changed, ValueError, "differs at 1"),
    "prunings": (lambda: changed(prunings={1: 0.5}), TypeError, "'prunings': 'dict'"),
    "no pair": (lambda: changed(prunings=[1]), ValueError, "pairs .*, got 1. The state"),
    "text": (lambda: changed(prunings=[["1", 0.5]]), ValueError, r"got \['1', 0.5\]. The state"),
    "too late": (lambda: changed(prunings=[[2, 0.5]]), ValueError, r"got \[2, 0.5\]. The state"),
    "options": (lambda: changed(options=[]), TypeError, "'options': 'list'"),
    "shapes": (lambda: changed(layers={"fc1": 3}), ValueError, "'fc1': 3 in the state"),
    "endless": (lambda: changed(step=10**400), ValueError, "whole number"),
    "unknown layer": (lambda: changed(masks={"fc9": ONES}), ValueError, "'fc9'. The state"),
    "too short": (lambda: changed(masks={"fc1": ONES[:63]}), ValueError, r"\[63\] for 'fc1'"),
    "bool": (lambda: changed(masks={"fc1": ONES.bool()}), ValueError, "torch.bool"),
    "no tensor": (lambda: changed(masks={"fc1": [1] * 64}), ValueError, "list for 'fc1'"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_state(name: str) -> None:
    run = Run("momentum", "cubic").train(0, 4)
    before = read(run.save())
    make, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        run.pruner.load_state_dict(make())
    assert str(caught.value).startswith("Pruner.load_state_dict: expected ")
    check_same(read(run.save()), before)


def test_the_layers_must_be_the_same() -> None:
    """All differences by name, with both shapes; nothing is changed."""
    state = Run("momentum", "cubic").train(0, 4).pruner.state_dict()
    other = cases.net()
    other.fc2 = nn.Linear(8, 5)
    other.append(nn.Linear(5, 3))
    pruner = Pruner(other, EXAMPLE, one_shot(0.5))
    with pytest.raises(ValueError) as caught:
        pruner.load_state_dict(state)
    assert str(caught.value) == (
        "Pruner.load_state_dict: expected the state of a pruner of the same layers, got one that "
        "differs in 2. Build the model as it was then."
        "\n  'fc2': [3, 8] in the state, [5, 8] here."
        "\n  '6': none in the state, [3, 5] here."
    )
    assert len(pruner.masks) == 0 and other.fc1.weight.all()
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    with pytest.raises(ValueError, match=r"differs in 33\.[\s\S]*and 23 more\.$"):
        Pruner(many, torch.ones(1, 1), one_shot(0.5)).load_state_dict(state)
