# SPDX-License-Identifier: MIT
"""Models and inputs that torch.export cannot follow: the module, the line, and a cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lap_ext

X = torch.ones(2, 3)


class Model(nn.Module):
    """Two layers, and what happens between them."""

    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(3, 4), nn.Linear(4, 2), between

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        return self.b(self.between(self.a(x), mask))


def doubled_if_positive(y: Tensor, _: Any) -> Tensor:
    if y.sum() > 0:
        y = y * 2
    return y


def counted(y: Tensor, _: Any) -> Tensor:
    for _ in range(int(y.abs().sum().item())):
        y = y + 1
    return y


def refused(y: Tensor, _: Any) -> Tensor:
    raise ValueError("x must have 4 dimensions\nand more")


BY_VALUE = (
    "trace: expected a path through the model that does not depend on the values of tensors, got a "
    "decision on such a value in Model, test_failures.py line {}: {}. Use torch.where there, or "
    "decide outside of forward and pass the decision as an argument that is no tensor"
)
BY_ERROR = (
    "trace: expected a model that torch.export can follow with these example_inputs, got {} {}, "
    "test_failures.py line {}: {}. If the model does not run on these inputs either, pass others "
    "(a tuple for positional, a dict for named ones). If it does, write that line with operations "
    "of PyTorch on tensors (no NumPy, no custom kernels)."
)
FORWARD = "return self.b(self.between(self.a(x), mask))"
FAILURES: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "branch": (doubled_if_positive, X, BY_VALUE.format(r"\d+", "if y.sum() > 0:")),
    "item": (counted, X, BY_VALUE.format(r"\d+", "for _ in range(int(y.abs().sum().item())):")),
    "shape": (
        lambda y, _: y,
        torch.ones(2, 5),
        BY_ERROR.format(
            "RuntimeError: a and b must have same reduction dim, but got [2, 5] X [3, 4]",
            "in module 'a' (Linear)",
            r"\d+",
            FORWARD,
        ),
    ),
    "own": (
        refused,
        X,
        BY_ERROR.format(
            "ValueError: x must have 4 dimensions",
            "in Model",
            r"\d+",
            'raise ValueError("x must have 4 dimensions\\nand more")',
        ),
    ),
    "numpy": (
        lambda y, _: torch.from_numpy(y.detach().numpy()),
        X,
        "got RuntimeError: .numpy() is not supported for tensor subclasses in Model, "
        r"test_failures.py line \d+: ",
    ),
    "missing": (
        lambda y, _: y,
        {"mask": X},
        "trace: expected inputs for Model.forward(x, mask=None), got 0 positional and ['mask'] "
        "named ones: missing a required argument: 'x'. Pass a tuple of positional arguments, or a "
        "dict of named ones.",
    ),
    "extra": (
        lambda y, _: y,
        (X, X, X),
        "inputs for Model.forward(x, mask=None), got 3 positional and no named ones: too many",
    ),
    "unknown": (
        lambda y, _: y,
        {"x": X, "masks": X},
        "got 0 positional and ['x', 'masks'] named ones: got an unexpected keyword argument",
    ),
}


@pytest.mark.parametrize("name", list(FAILURES))
def test_failures_say_where_and_what_to_do(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    between, inputs, text = FAILURES[name]
    model = Model(between).train()
    with pytest.raises(lap_ext.TopologyError) as error:
        lap_ext.trace(model, inputs)
    assert re.search(re.escape(text).replace(r"\\d\+", r"\d+"), str(error.value)), error.value
    assert capfd.readouterr() == ("", "")  # no graph, no logs
    assert model.training and "forward" not in vars(model)


@dataclass
class Opaque:
    """Not a container that PyTorch knows."""

    y: Any


def test_inputs_of_other_types() -> None:
    for value, name in ((X.numpy(), "numpy.ndarray"), (Opaque(X), "tests.topology.test_failures")):
        with pytest.raises(TypeError, match=rf"^trace: expected inputs of tensors.* got a {name}"):
            lap_ext.trace(Model(lambda y, _: y), value)
    assert isinstance(X.numpy(), np.ndarray)


def test_what_the_errors_advise_works() -> None:
    where = Model(lambda y, _: torch.where(y.sum() > 0, y * 2, y))
    argument = Model(lambda y, double: y * 2 if double else y)
    for model, inputs in ((where, X), (argument, (X, True)), (argument, {"x": X, "mask": False})):
        assert [edge.name for edge in lap_ext.trace(model, inputs).layers["a"].next] == ["b"]


class DynamicCache:
    """As transformers': no output that layers feed."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Config:
    """As transformers': use_cache, and configs within."""

    def __init__(self, **inside: Any) -> None:
        self.use_cache = True
        vars(self).update(inside)

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class Cached(nn.Module):
    """Takes use_cache from the config of its text model; returns objects."""

    def __init__(self, looks: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o, self.looks = nn.Linear(3, 3), nn.Linear(3, 3), looks
        self.config = Config(text_config=Config())

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        q = self.q(x)
        use = kwargs.get("use_cache", self.config.text_config.use_cache)
        if self.looks and use:
            raise AssertionError("a cache")
        return Opaque([self.o(q), {"past": DynamicCache(q)}])


def test_caches_are_switched_off_and_objects_are_outputs() -> None:
    model = Cached()
    scores = lap_ext.scores(model, X)
    assert torch.equal(scores["q"], lap_ext.score(None, model.q.weight, model.o.weight))
    configs = [model.config, model.config.text_config]
    assert all(config.use_cache is True for config in configs)
    assert "forward" not in vars(model) and model.looks
    ignoring = lap_ext.trace(Cached(looks=False), X)  # a cache that is made nevertheless
    assert [edge.name for edge in ignoring.layers["q"].next] == ["o"]


def test_a_mapping_of_any_kind_is_named_inputs() -> None:
    """What a tokenizer returns is a UserDict."""
    from collections import UserDict

    model = Model(lambda y, _: y)
    model.dummy_inputs = {"x": X}
    for inputs in (UserDict(x=X), model.dummy_inputs, [X], (X,), X):
        assert list(lap_ext.prune(model, inputs, 0.5, apply=False).masks) == ["a", "b"]
