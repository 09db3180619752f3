# SPDX-License-Identifier: MIT
"""Errors in parts: how they are put into words, and what each context adds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lap_ext
from lap_ext.errors import (
    LapError,
    LapImportError,
    LapOSError,
    LapRuntimeError,
    LapTypeError,
    LapValueError,
    TopologyError,
    callback,
    calling,
    in_layer,
)

KINDS = {
    LapValueError: ValueError,
    LapTypeError: TypeError,
    LapImportError: ModuleNotFoundError,
    LapOSError: OSError,
    LapRuntimeError: RuntimeError,
    TopologyError: ValueError,
}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def fail(argument: str = "w", option: str = "") -> None:
    raise LapValueError(
        "finite weights in {argument}", "2", "Repair {argument}.", argument=argument, option=option
    )


def text_of(error: pytest.ExceptionInfo[LapError]) -> str:
    return str(error.value)


# ---- words ---------------------------------------------------------------------------------------
def test_text_without_parts() -> None:
    assert str(LapValueError("a model")) == "expected a model."
    assert str(LapValueError("a model", "none")) == "expected a model, got none."
    assert str(LapValueError("a model", cure="Pass one.")) == "expected a model. Pass one."
    assert str(LapValueError("n >= 1", 0)) == "expected n >= 1, got 0."
    assert LapValueError("n >= 1", 0).got == "0"


def test_an_option_ends_the_cure_until_a_layer_is_known() -> None:
    error = LapValueError("numbers", "NaN", "Repair them.", option="pass check_finite=False")
    assert str(error) == "expected numbers, got NaN. Repair them, or pass check_finite=False."
    error.layer = "fc1"
    assert str(error) == "layer 'fc1': expected numbers, got NaN. Repair them."


def test_argument_stands_in_every_part() -> None:
    error = LapValueError("{argument} >= 1", "{argument}=0", "Raise {argument}.", argument="rounds")
    error.function = "prune"
    assert str(error) == "prune: expected rounds >= 1, got rounds=0. Raise rounds."
    spelled = error.text(lambda name: f"--{name}", named=False)
    assert spelled == "expected --rounds >= 1, got --rounds=0. Raise --rounds."


def test_braces_of_a_user_are_not_read() -> None:
    """A name with braces is shown as it is."""
    assert str(LapValueError("a name", "{0}", argument="{x}")) == "expected a name, got {0}."


# ---- classes -------------------------------------------------------------------------------------
@each_kind
def test_is_the_built_in_error(kind: type[LapError]) -> None:
    with pytest.raises(KINDS[kind], match=r"^expected a, got b\. C\.$") as caught:
        raise kind("a", "b", "C.")
    assert isinstance(caught.value, LapError)


@each_kind
@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_have_all_fields(kind: type[LapError], again: Any) -> None:
    error = kind("a {argument}", "b", "C.", argument="memory")
    error.option, error.layer = "pass d", "fc1"
    error.function, error.final = "checkpoint.prune", True
    twin = again(error)
    assert type(twin) is kind and vars(twin) == vars(error) and twin.args == error.args
    assert str(twin) == str(error) == "checkpoint.prune, layer 'fc1': expected a memory, got b. C."


def test_errors_of_native_kernels_are_copied_with_all_fields() -> None:
    weight = torch.tensor([[1.0, torch.nan]])
    with pytest.raises(LapValueError) as caught:
        lap_ext.score(None, weight, None)
    error = caught.value
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is LapValueError and vars(twin) == vars(error)
        assert (twin.function, twin.argument) == ("score", "w")
        assert str(twin) == str(error)


def test_name_of_a_missing_package() -> None:
    error = LapImportError("the package x", "no module named x", name="x")
    assert error.name == "x" and pickle.loads(pickle.dumps(error)).name == "x"


# ---- calling -------------------------------------------------------------------------------------
def test_the_outermost_function_is_named() -> None:
    @calling("mask")
    def inner() -> None:
        fail()

    @calling("prune")
    def outer() -> None:
        inner()

    with pytest.raises(LapValueError, match=r"^mask: "):
        inner()
    with pytest.raises(LapValueError, match=r"^prune: "):
        outer()
    with pytest.raises(LapValueError, match=r"^Pruner\.step: "), calling("Pruner.step"):
        outer()


def test_calling_leaves_a_function_as_it_is() -> None:
    @calling("f")
    def f(a: int, *, b: int = 2) -> tuple[int, int]:
        """Says what it was given."""
        return a, b

    assert f(1) == (1, 2) and f(1, b=3) == (1, 3)
    assert (f.__name__, f.__doc__) == ("f", "Says what it was given.")


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError) as caught, calling("prune"), in_layer("fc1"), callback():
        raise KeyError("x")
    assert vars(caught.value) == {}


def test_within_a_generator() -> None:
    def steps() -> Iterator[int]:
        with calling("steps"):
            yield 1
            fail()

    made = steps()
    assert next(made) == 1
    with pytest.raises(LapValueError, match=r"^steps: "):
        next(made)


def test_compiles() -> None:
    """The decorator stays in one graph."""

    @calling("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


# ---- in_layer ------------------------------------------------------------------------------------
def test_the_innermost_layer_is_named() -> None:
    with pytest.raises(LapValueError) as caught, in_layer("body"), in_layer("body.fc1"):
        fail("sparsity")
    assert caught.value.layer == "body.fc1"
    with pytest.raises(LapValueError) as given, in_layer("body"):
        raise LapValueError("a", layer="head")
    assert given.value.layer == "head"


def test_w_is_the_layer() -> None:
    """A user of a model knows no w."""
    with pytest.raises(LapValueError) as caught, calling("prune"), in_layer("fc1"):
        fail("w")
    assert str(caught.value) == (
        "prune: expected finite weights in layer 'fc1', got 2. Repair layer 'fc1'."
    )
    with pytest.raises(LapValueError) as other, calling("prune"), in_layer("fc1"):
        fail("w_prev")
    assert str(other.value) == (
        "prune, layer 'fc1': expected finite weights in w_prev, got 2. Repair w_prev."
    )


def test_an_error_after_a_loop_has_no_layer() -> None:
    with pytest.raises(LapValueError) as caught, calling("prune"):
        for name in ("a", "b"):
            with in_layer(name):
                pass
        fail("data")
    assert caught.value.layer is None and str(caught.value).startswith("prune: ")


# ---- callback ------------------------------------------------------------------------------------
def test_what_a_users_function_called_is_final() -> None:
    def criterion() -> None:
        lap_ext.score(None, torch.tensor([[torch.nan]]), None)

    with pytest.raises(LapValueError) as caught, calling("prune"), in_layer("fc1"), callback():
        criterion()
    error = caught.value
    assert (error.function, error.layer, error.final) == ("score", None, True)
    assert str(error).startswith("score: expected finite weights in w, got 1 ")
    assert str(error).endswith("or pass check_finite=False to rank them as they come.")


def test_an_error_without_a_function_is_not_final() -> None:
    """A callback that raises an error of its own: who called is added."""
    with pytest.raises(LapValueError) as caught, calling("prune"), in_layer("fc1"), callback():
        fail("data")
    assert (caught.value.function, caught.value.layer) == ("prune", "fc1")


def test_a_criterion_of_the_users() -> None:
    """The whole way: the error of a function that a criterion calls, out of prune."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))

    def criterion(layer: Any) -> torch.Tensor:
        return lap_ext.score(None, layer.weight, None, groups=0)

    with pytest.raises(LapValueError, match=r"^score: expected groups >= 1 ") as caught:
        lap_ext.prune(model, torch.ones(1, 3), 0.5, criterion=criterion)
    assert caught.value.final and caught.value.layer is None
