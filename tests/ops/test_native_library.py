# SPDX-License-Identifier: MIT
"""The native library is loaded; without it the other tests would compare the reference with itself.

LAP_EXT_BUILD=pure or LAP_EXT_NATIVE=0 say that the fallback is wanted; only then does this skip.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import torch

import lap_ext
import lap_ext.ops.schema
from lap_ext.ops import native
from tests.helpers.parameters import needs_native
from tests.helpers.processes import run_python

PACKAGE = Path(lap_ext.__file__).parent
LEVELS = ("baseline", "v3", "v4")
OPS = [
    "row_squared_norms",
    "col_squared_norms",
    "score",
    "mask",
    "prune_",
    "topk_mask",
    "kth_largest",
    "count_keys",
    "key_histogram",
    "squares_above",
    "threshold_mask",
    "random_scores_",
    "masked_zero_",
    "nonzero_mask",
    "nm_mask",
    "transposable_mask",
    "block_sums_",
    "block_mask",
]


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_op_has_a_native_cpu_kernel(op: str) -> None:
    # Not "CPU has some kernel": the default kernel would do for that.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lap_ext::{op}", "CPU")


@needs_native
def test_libraries_are_in_the_package() -> None:
    (library,) = PACKAGE.glob("_C.abi3.so")
    assert list(PACKAGE.glob("_np*.so"))
    isa = ctypes.CDLL(str(library)).lap_ext_isa
    isa.restype = ctypes.c_char_p
    assert isa().decode() in LEVELS


@needs_native
def test_info_tells_what_is_loaded() -> None:
    text = str(lap_ext.info()).lower()
    assert any(level in text for level in LEVELS), text
    assert "cuda" in text and torch.__version__.lower() in text and lap_ext.__version__ in text


@needs_native
def test_unknown_isa_is_an_error() -> None:
    result = run_python("import lap_ext; print(lap_ext.info())", LAP_EXT_ISA="v9")
    assert result.returncode != 0 and "v9" in result.stderr and "LAP_EXT_ISA" in result.stderr


def test_fallback_on_request() -> None:
    code = (
        "import torch, lap_ext.ops.schema\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key('lap_ext::mask', 'CPU')\n"
        "m = lap_ext.mask(None, torch.tensor([[3., 1., 2.]]), None, keep=2)\n"
        "print(has, m.tolist(), 'LAP_EXT_NATIVE' in str(lap_ext.info()))\n"
    )
    result = run_python(code, LAP_EXT_NATIVE="0")
    assert result.stdout.split("\n")[0] == "False [[True, False, True]] True", result.stderr


def test_a_lost_library_is_named_with_a_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "_state", native._State())
    with pytest.warns(UserWarning, match=r"_C\.abi3\.so is not in .* Install it again: pip"):
        native.load()
    assert "was built with it" in str(native.info()) and "\ncure: Install it again" in str(
        native.info()
    )


@needs_native
def test_numpy_says_why_it_has_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lap_ext.ops import numpy_args

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    note = {"_np": ["no C++ compiler was found", "Install one"]}
    (tmp_path / "not_built.json").write_text(json.dumps(note))
    monkeypatch.setattr(numpy_args, "__file__", str(tmp_path / "ops" / "numpy_args.py"))
    monkeypatch.setattr(numpy_args.importlib, "import_module", missing)
    with pytest.raises(
        ImportError, match=r"got It was built without: no C\+\+ .* Install one: pip"
    ):
        numpy_args._loaded()
