# SPDX-License-Identifier: MIT
"""Adapters are loaded when they are first used, each with its framework."""

from __future__ import annotations

import importlib
import sys

import pytest

import lap_ext
from tests.helpers.processes import run_python


def test_the_package_does_not_import_adapters() -> None:
    code = (
        "import sys, lap_ext; [getattr(lap_ext, name) for name in lap_ext.__all__]; "
        "assert not any(name.startswith('lap_ext.adapters.') or name == 'transformers' "
        "for name in sys.modules)"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr


def test_an_adapter_is_loaded_when_it_is_first_used() -> None:
    code = (
        "import sys, lap_ext; assert 'lap_ext.adapters' not in sys.modules; "
        "adapter = lap_ext.adapters.torch_prune; "
        "assert adapter is sys.modules['lap_ext.adapters.torch_prune']"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr


def test_without_the_framework() -> None:
    """The submodule's own error, which says what to install."""
    code = "import sys; sys.modules['nncf'] = None; import lap_ext; lap_ext.adapters.nncf"
    run = run_python(code)
    text = "lap_ext.adapters.nncf: expected the nncf package (3 or later), got none that can be"
    assert run.returncode == 1 and text in run.stderr.splitlines()[-1], run.stderr


def test_names_that_are_no_adapters() -> None:
    for name in ("nothing", "_nothing", "__nothing__"):
        with pytest.raises(AttributeError, match=f"'lap_ext.adapters' has no attribute '{name}'"):
            getattr(lap_ext.adapters, name)
    assert not hasattr(lap_ext.adapters, "torch")
    assert importlib.import_module("lap_ext.adapters.torch_ao") is lap_ext.adapters.torch_ao
    assert "lap_ext.adapters.torch_ao" in sys.modules
