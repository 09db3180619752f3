# SPDX-License-Identifier: MIT
"""Loads a torch.export program (.pt2) only if loading it cannot execute code.

torch.export.load (torch 2.13) unpickles example inputs where weights_only=True fails, and every
tensor that the file declares as pickled; it loads compiled code, evaluates expressions, and accepts
any function below torch as an operation. So the file is read first, by the reader that
torch.export.load uses, and rejected unless all of it is harmless:

    records      tensors as bytes, JSON, example inputs for torch.load(weights_only=True); no others
    operations   those of aten, except the one that opens files, and Python's arithmetic
    expressions  of sizes: numbers, symbols, + - * / and a few functions of sympy and torch
    names        letters, digits and _ . + - only: some become Python code (strings are quoted)
    structures   tuples, lists and dicts
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lap_ext.errors import LapValueError

_RECORD = re.compile(
    r"byteorder|version|archive_format|archive_version|\.data/(version|serialization_id)|"
    r"models/\w+\.json|data/weights/(weight_\d+|\w+_weights_config\.json)|"
    r"data/constants/(tensor_\d+|\w+_constants_config\.json)|data/sample_inputs/\w+\.pt"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_WORD = re.compile(r"\w*")  # becomes a name in Python code
_NAME = re.compile(r"[\w.+-]*")  # of parameters, versions, devices
_SYMBOL = re.compile(r"[a-z]{1,3}\d+")
_FUNCTIONS = {"Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod",
              "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing"}  # fmt: skip
_SYNTAX = (ast.Expression, ast.Call, ast.keyword, ast.Load, ast.UnaryOp, ast.USub, ast.BinOp,
           ast.Add, ast.Sub, ast.Mult, ast.Div)  # fmt: skip
_ARITHMETIC = {"getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos",
               "eq", "ne", "le", "ge", "lt", "gt"}  # fmt: skip
_STRUCTURES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_VALUES = {
    "as_none", "as_tensor", "as_tensors", "as_int", "as_ints", "as_float", "as_floats", "as_bool",
    "as_bools", "as_string", "as_strings", "as_sym_int", "as_sym_ints", "as_sym_bool",
    "as_sym_float", "as_scalar_type", "as_memory_format", "as_layout", "as_device",
    "as_optional_tensors", "as_optional_tensor", "as_nested_tensors", "as_expr", "as_name",
}  # fmt: skip
_EMPTY = {"custom_obj_values", "treespec_namedtuple_fields"}


class _UnsafeError(Exception):
    """Names what in the file could execute code, as the end of a sentence."""


def load(path: Path) -> tuple[Any, nn.Module]:
    """Loads an ExportedProgram and its module; ValueError if loading it could execute code."""
    with path.open("rb") as file:
        try:
            _check(file)
            file.seek(0)
            with _silent("torch.export"):  # it logs what it raises
                program = torch.export.load(file)
            return program, program.module(check_guards=False)  # guards are Python code
        except _UnsafeError as error:
            raise LapValueError(
                "a program that cannot execute code when it is loaded",
                f"{str(path)!r} with {error}",
                "If you trust it, write a factory that returns torch.export.load(...).module() and "
                "its example inputs.",
            ) from None
        except Exception as error:  # of zip, JSON, torch: all sorts
            raise LapValueError(
                "a program written by torch.export.save",
                f"{str(path)!r}, which is something else, is damaged, or was written by a version "
                f"that torch {torch.__version__} cannot read",
                "Export the model again.",
            ) from error


def example_inputs(exported: Any, module: nn.Module) -> Any:
    """Returns the example inputs of a program, as `lap_ext.trace` takes them; None if it has none.

    A program with both positional and named inputs gets all of them by name; its module is changed
    to accept that.
    """
    args, named = exported.example_inputs or (None, {})
    if not (args and named):
        return dict(named) or args
    inputs = dict(inspect.signature(module.forward).bind(*args, **named).arguments)
    vars(module)["_in_spec"] = pytree.tree_structure(
        ((), inputs)
    )  # what inputs are checked against
    return inputs


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check(file: IO[bytes]) -> None:
    archive = torch._C.PyTorchFileReader(file)
    for name in archive.get_all_records():
        _require(_RECORD.fullmatch(name), f"the record {name!r}")
    models = 0
    for name in archive.get_all_records():
        if name.endswith(".json"):
            facts = json.loads(archive.get_record(name).decode())
            (_check_model if name.startswith("models/") else _check_tensors)(facts)
            models += name.startswith("models/")
        elif name.startswith("data/sample_inputs/"):
            _check_inputs(archive.get_record(name))
    _require(models == 1, f"{models} models in it")


def _require(condition: object, what: str) -> None:
    if not condition:
        raise _UnsafeError(what)


def _check_inputs(data: bytes) -> None:
    """Checks that torch.export.load need not unpickle them, as it does if this fails."""
    if not data:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(data), weights_only=True)
    except Exception:
        raise _UnsafeError("example inputs that are not plain tensors and numbers") from None


def _check_tensors(facts: Any) -> None:
    for name, payload in facts["config"].items():
        _require(not payload["use_pickle"], f"the pickled tensor {name!r}")
        _require(_PAYLOAD.fullmatch(payload["path_name"]), f"the tensor {payload['path_name']!r}")
    _walk(facts)


def _check_model(facts: Any) -> None:
    _walk(facts)
    for node in facts["graph_module"]["graph"]["nodes"]:
        _require(_is_harmless(node["target"]), f"the operation {node['target']!r}")


def _is_harmless(target: str) -> bool:
    """Tells whether a name is that of an operation which only computes."""
    root, *names = target.split(".")
    if root == "_operator":
        return len(names) == 1 and names[0] in _ARITHMETIC
    if (
        root != "torch"
        or names[:2] != ["ops", "aten"]
        or len(names) != 4
        or names[2] == "from_file"
    ):
        return False
    packet = getattr(torch.ops.aten, names[2], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return isinstance(getattr(packet, names[3], None), torch._ops.OpOverload)


def _walk(facts: Any, under: str = "") -> None:
    """Checks every name and text of a JSON document, by the rule for its key."""
    for key, value in _items(facts, under):
        _require(_NAME.fullmatch(key), f"the name {key!r}")
        _require(not key.startswith("as_") or key in _VALUES, f"a value {key!r}")
        _require(key not in _EMPTY or not value, f"{key!r}")
        if isinstance(value, (dict, list)):
            _walk(value, "metadata" if under == "metadata" else key)
        elif isinstance(value, str) and under != "metadata":
            _require(_RULES.get(key, _NAME.fullmatch)(value), f"{key} {value[:60]!r}")


def _items(facts: Any, under: str) -> Iterator[tuple[str, Any]]:
    """Yields keys and values; the items of a list have the list's key."""
    if isinstance(facts, Mapping):
        yield from facts.items()
    else:
        yield from ((under, value) for value in facts)


def _is_expression(text: str) -> bool:
    """Tells whether an expression of sizes only computes."""
    return all(map(_is_computing, ast.walk(ast.parse(text, mode="eval"))))


def _is_computing(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        value = node.value
        symbol = isinstance(value, str) and _SYMBOL.fullmatch(value) is not None
        return symbol or isinstance(value, (int, float))
    return isinstance(node, _SYNTAX)


def _is_structure(text: str) -> bool:
    """Tells whether a description of nested tuples, lists and dicts holds nothing else."""

    def plain(spec: Any) -> bool:
        context = json.loads(spec["context"] or "null")
        names = [] if context is None else context
        return (
            spec["type"] in _STRUCTURES
            and isinstance(names, list)
            and all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
            and all(map(plain, spec["children_spec"]))
        )

    return plain(json.loads(text)[1])


def _is_any(_text: str) -> bool:
    """Accepts a text that is quoted as Python quotes strings, or unused by check_guards=False."""
    return True


_RULES: Mapping[str, Callable[[str], object]] = {
    "name": _WORD.fullmatch,
    "as_name": _WORD.fullmatch,
    "forward_arg_names": _WORD.fullmatch,
    "as_string": _is_any,
    "as_strings": _is_any,
    "guards_code": _is_any,
    "expr_str": _is_expression,
    "in_spec": _is_structure,
    "out_spec": _is_structure,
}
