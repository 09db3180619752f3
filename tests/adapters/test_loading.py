# SPDX-License-Identifier: MIT
"""Adapters are loaded when they are first used, each with its framework, or say what is missing."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest

import lap_ext
from tests.helpers.processes import run_python

# adapter, what takes the place of modules of its framework, what its error says
CASES: dict[str, tuple[str, dict[str, str], str]] = {
    "llmcompressor": (
        "llmcompressor",
        {"llmcompressor": "None"},
        "expected the llmcompressor package (0.14 or later), got none that can be imported",
    ),
    "nncf": (
        "nncf",
        {"nncf": "None"},
        "expected the nncf package (3 or later), got none that can be imported",
    ),
    "an older nncf": (
        "nncf",
        {"nncf": "module(__version__='2.9')"},
        "expected an nncf with nncf.prune (3 or later; made with 3.4.0), got nncf 2.9",
    ),
    "torch_ao": (
        "torch_ao",
        {"torch.ao.pruning": "None"},
        "expected a torch with torch.ao.pruning, got torch",
    ),
    "torch_pruning": (
        "torch_pruning",
        {"torch_pruning": "None"},
        "expected the torch-pruning package (1.6 or later), got none that can be imported",
    ),
    "an older torch_pruning": (
        "torch_pruning",
        {
            "torch_pruning.pruner": "module(function=None)",
            "torch_pruning": "module(__path__=[], pruner=sys.modules['torch_pruning.pruner'])",
        },
        "expected torch-pruning 1.6 or later (it has BasePruner), got an older one.",
    ),
    "transformers": (
        "transformers",
        {"transformers": "None"},
        "expected the transformers package (5 or later), got none that can be imported",
    ),
    "an older transformers": (
        "transformers",
        {"transformers": "module(TrainerCallback=Empty, PreTrainedModel=Empty)"},
        "expected transformers 5 or later (its callbacks have on_optimizer_step)",
    ),
}
PROGRAM = """
import json, sys, types
import lap_ext

class Empty: pass

def module(**attributes):
    made = types.ModuleType("made")
    vars(made).update(attributes)
    return made

told = {"imported with lap_ext": "lap_ext.adapters" in sys.modules}
for name in lap_ext.__all__:
    getattr(lap_ext, name)
told["modules"] = sorted(sys.modules)
told["loaded"] = lap_ext.adapters.torch_prune is sys.modules["lap_ext.adapters.torch_prune"]
for case, (adapter, stand_ins) in CASES.items():
    before = dict(sys.modules)
    vars(lap_ext.adapters).pop(adapter, None)  # where another case has loaded it
    for name, code in stand_ins.items():
        sys.modules[name] = eval(code)
    try:
        getattr(lap_ext.adapters, adapter)
        told[case] = "loaded"
    except ModuleNotFoundError as error:
        told[case] = str(error)
    sys.modules.clear()
    sys.modules.update(before)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What one fresh interpreter says of all cases: torch is imported once."""
    given = {case: (adapter, stand_ins) for case, (adapter, stand_ins, _) in CASES.items()}
    run = run_python(f"CASES = {given!r}\n{PROGRAM}")
    assert run.returncode == 0, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def test_the_package_does_not_import_adapters(told: dict[str, Any]) -> None:
    assert "torch" in told["modules"]
    assert not any(
        name.startswith("lap_ext.adapters.") or name == "transformers" for name in told["modules"]
    )


def test_an_adapter_is_loaded_when_it_is_first_used(told: dict[str, Any]) -> None:
    assert not told["imported with lap_ext"] and told["loaded"]


@pytest.mark.parametrize("case", CASES)
def test_without_the_framework(case: str, told: dict[str, Any]) -> None:
    """The submodule's own error, which says what to install. Lightning's is in its own tests."""
    adapter, _, text = CASES[case]
    last = told[case].splitlines()[-1]
    assert last.startswith(f"lap_ext.adapters.{adapter}: expected ") and text in last


def test_names_that_are_no_adapters() -> None:
    for name in ("nothing", "_nothing", "__nothing__"):
        with pytest.raises(AttributeError, match=f"'lap_ext.adapters' has no attribute '{name}'"):
            getattr(lap_ext.adapters, name)
    assert not hasattr(lap_ext.adapters, "torch")
    assert importlib.import_module("lap_ext.adapters.torch_ao") is lap_ext.adapters.torch_ao
    assert "lap_ext.adapters.torch_ao" in sys.modules
