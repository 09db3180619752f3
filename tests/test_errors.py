# SPDX-License-Identifier: MIT
"""Errors in parts: how they are put into words, and what each context adds."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import criteria
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
    warn,
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


# ---- options ------------------------------------------------------------------------------------
def test_options_are_spelled_for_whom_they_are_shown_to() -> None:
    """In what was expected and in cures; what came is the user's, and stays as it is."""
    around = "{'fc': ('in', None)}"
    error = LapValueError("no {scope='global'}", "{a='b'}", f"Give {{neighbors={around}}} {{x=}}.")
    assert str(error) == f"expected no scope='global', got {{a='b'}}. Give neighbors={around} x=."
    said = error.text(option=lambda name, value: f"--{name} {value.strip(chr(39))}".strip())
    assert said == f"expected no --scope global, got {{a='b'}}. Give --neighbors {around} --x."


SHARED = [lap_ext.prune, lap_ext.checkpoint.prune, lap_ext.trace, lap_ext.checkpoint.verify]
OPTIONS = {name for function in SHARED for name in inspect.signature(function).parameters}
OTHERS = {"adapters", "ops", "numpy.py", "criteria", "cli", "report"}  # whose texts are no cures
SPELLED = re.compile(rf"(?<![{{\w])({'|'.join(OPTIONS - {'apply', 'data'})})=")


def texts(tree: ast.AST) -> Iterator[ast.AST]:
    """Lists what was expected, cures, and constants, which may become one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.search(r"Error$|^warn$", ast.unparse(node.func)):
            yield from (*node.args[:1], *node.args[2:], *(x.value for x in node.keywords))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.value


PACKAGE = Path(lap_ext.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", [x for x in MODULES if x.split("/")[0] not in OTHERS])
def test_options_in_messages_are_marked(name: str) -> None:
    """Else the command line would show scope='global' where --scope global is typed."""
    for text in texts(ast.parse(MODULES[name].read_text())):
        for node in ast.walk(text):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = SPELLED.search(node.value)
                assert not found, f"{name}:{node.lineno}: {found and found[0]} needs a mark"


# ---- words ---------------------------------------------------------------------------------------
def test_text_without_parts() -> None:
    assert str(LapValueError("a model")) == "expected a model."
    assert str(LapValueError("a model", "none")) == "expected a model, got none."
    assert str(LapValueError("a model", cure="Pass one.")) == "expected a model. Pass one."
    assert str(LapValueError("n >= 1", 0)) == "expected n >= 1, got 0."
    assert LapValueError("n >= 1", 0).got == "0"


def test_argument_stands_in_every_part() -> None:
    error = LapValueError("{argument} >= 1", "{argument}=0", "Raise {argument}.", argument="rounds")
    error.function = "prune"
    assert str(error) == "prune: expected rounds >= 1, got rounds=0. Raise rounds."
    spelled = error.text(lambda name: f"--{name}", named=False)
    assert spelled == "expected --rounds >= 1, got --rounds=0. Raise --rounds."


def test_braces_of_a_user_are_not_read() -> None:
    """A name with braces is shown as it is."""
    assert str(LapValueError("a name", "{0}", argument="{x}")) == "expected a name, got {0}."


def test_names_in_a_text_are_visible() -> None:
    """Names come from files; the breaks between the lines of a list are the text's own."""
    error = LapValueError("a tensor \x1b[31m", "\u202eb\ud800:\n  c", "Rename \x07.")
    error.function, error.layer = "prune", "d\x1b\n"
    shown = (
        r"prune, layer 'd\x1b\n': expected a tensor \x1b[31m, got \u202eb\ud800:"
        "\n"
        r"  c. Rename \x07."
    )
    assert str(error) == shown
    with pytest.warns(UserWarning) as caught:
        warn("a\x1b\nb")
    assert str(caught[0].message) == "a\\x1b\nb"


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


# --- after a review: what was misattributed or misworded ----------------------------------------


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.ones(1, 4)


def wrong_call(*_: object) -> Any:
    return lap_ext.score(None, None, None)  # type: ignore[arg-type]


class Asking(criteria.Criterion):
    def weight(self, network: object, chunk: object) -> Any:
        return wrong_call()


class Preparing(criteria.Criterion):
    def prepare(self, network: object, data: object) -> Any:
        return wrong_call()


def batches() -> Iterator[torch.Tensor]:
    wrong_call()
    yield X


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": wrong_call},
        {"criterion": Asking()},
        {"criterion": Preparing()},
        {"on_progress": wrong_call},
        {"criterion": "wanda", "data": batches()},
        {"criterion": criteria.WeightGradient(loss=wrong_call), "data": [X]},
    ],
    ids=["function", "weight", "prepare", "on_progress", "data", "loss"],
)
def test_an_error_in_the_users_code_names_what_it_called(options: Any) -> None:
    with pytest.raises(LapTypeError, match=r"^score: expected w to be a torch\.Tensor, got None"):
        lap_ext.prune(small(), X, 0.5, **options)


def test_layers_of_different_dtypes_are_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).double())

    text = "got torch.float32 for layer 'a' and torch.float64 for layer 'b'"
    with pytest.raises(
        TypeError, match=f"^prune: expected all scores to share one dtype .* {text}"
    ):
        lap_ext.prune(Mixed(), X, 0.5, scope="global", normalize="none")


def test_option_is_the_cure_until_a_layer_is_known() -> None:
    error = LapValueError("x", "y", "Repair it.", option="Repair it, or pass z=1.")
    assert str(error) == "expected x, got y. Repair it, or pass z=1."
    error.layer = "fc"
    assert str(error) == "layer 'fc': expected x, got y. Repair it."
    error = LapValueError("x", "y", option="Pass z=1.")
    assert str(error) == "expected x, got y. Pass z=1."


def test_a_layer_is_never_lost() -> None:
    error = LapValueError("finite values", "nan", argument="w")
    error.layer = "fc"
    assert str(error) == "layer 'fc': expected finite values, got nan."


def test_a_name_with_the_mark_ends() -> None:
    """The native text is filled from left to right, once."""
    weight = torch.tensor([[float("nan")]])
    with pytest.raises(ValueError, match=r"finite weights in \{argument\}, got 1 non-finite"):
        torch.ops.lap_ext.row_squared_norms(weight, True, "{argument}")


@pytest.mark.parametrize(
    "call",
    [
        lambda m, **given: lap_ext.trace(m, torch.ones(4, 4), **given),
        lambda m, **given: lap_ext.scores(m, torch.ones(4, 4), **given),
        lambda m, **given: lap_ext.prune(m, torch.ones(4, 4), 0.5, **given),
        lambda m, **given: lap_ext.Pruner(m, torch.ones(4, 4), lap_ext.one_shot(0.5), **given),
    ],
    ids=["trace", "scores", "prune", "Pruner"],
)
def test_a_warning_is_at_the_users_line(call: Any) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.linalg.matrix_exp(self.a(x)))

    with pytest.warns(UserWarning, match="it counts as a boundary") as found:
        topology = call(Odd(), on_unsupported="cut") if callable(call) else None
    assert found[0].filename == __file__, topology


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": 5}, "^prune: expected layers to be patterns of layer names, .*, got int"),
        (
            {"exclude": None},
            "^prune: expected exclude to be patterns of layer names, .*, got NoneType",
        ),
        ({"layers": [5]}, "^prune: expected layers to be patterns of layer names, .*, got int"),
        ({"masks": 5}, "^prune: expected masks to be a mapping of layer name"),
        ({"topology": "x"}, "^prune: expected topology alone"),
    ],
)
def test_wrong_types(options: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        lap_ext.prune(small(), X, 0.5, **options)


def test_layers_may_come_from_a_generator() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = lap_ext.Pruner(
        model, X, lap_ext.one_shot(0.5), optimizer=optimizer, layers=(n for n in ["2"])
    )
    assert list(pruner.step().masks) == ["2"]
    nothing = lap_ext.Pruner(model, X, lap_ext.one_shot(0.5), optimizer=optimizer, layers=())
    assert nothing.step() is None
