# SPDX-License-Identifier: MIT
"""MODEL of a command line: a folder, a program, or a module that a function of the user's makes.

No pickle is loaded: weights come from safetensors files, or from a program in which nothing can run
(program.py).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lap_ext._text import some
from lap_ext.cli import program
from lap_ext.cli.output import Progress
from lap_ext.topology import Topology, trace

_PROGRAM = ".pt2"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar"}


@dataclass
class Made:
    """A module that a factory has made, with its weights, and inputs for the trace."""

    name: str
    module: nn.Module
    example_inputs: Any
    kwargs: dict[str, Any] = field(default_factory=dict)
    program: Any = None  # the ExportedProgram whose module it is

    def trace(self, unknown: str) -> Topology:
        """Who feeds whom."""
        return trace(self.module, self.example_inputs, self.kwargs, unknown=unknown)


def is_folder(options: Any) -> bool:
    """Whether MODEL is a folder; ValueError if it is nothing that is understood."""
    given = options.model
    path = Path(given)
    if path.is_dir():
        if options.checkpoint or options.input:
            raise ValueError("expected --checkpoint and --input with a factory only, got a folder.")
        return True
    if path.suffix == _PROGRAM:
        return False
    if path.suffix in _PICKLES:
        raise ValueError(
            f"expected a folder, a .pt2 program or package.module:factory, got the pickle file {given!r}, which "
            "can run any code when it is loaded. Save its state_dict with safetensors.torch."
            "save_file and pass that as --checkpoint of a factory."
        )
    if path.suffix == ".safetensors":
        raise ValueError(
            f"expected a folder, a .pt2 program or package.module:factory, got the file {given!r}, which does not "
            "say how its weights are connected. Pass its folder, or a factory with --checkpoint."
        )
    module, colon, name = given.partition(":")
    if not (colon and name and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(
            f"expected a folder, a .pt2 program or package.module:factory, got {given!r}, and no such folder."
        )
    return False


def ways(options: Any) -> dict[str, Any]:
    """The options of scoring, as lap_ext.prune and lap_ext.scores take them."""
    names = ("criterion", "normalize", "exclude", "bn")
    return {name: getattr(options, name) for name in names}


def traced(options: Any, progress: Progress) -> tuple[Made, Topology]:
    """The module of a factory, and who feeds whom in it."""
    if getattr(options, "memory", None) is not None:
        raise ValueError("expected --memory with a folder only: a factory's module is in memory.")
    progress.step(f"make {options.model}")
    made = make(options)
    progress.step("trace")
    return made, made.trace(options.unknown)


def make(options: Any) -> Made:
    """The module of a factory with the weights of --checkpoint, or that of a program."""
    is_program = Path(options.model).suffix == _PROGRAM
    made = _of_program(options) if is_program else _of_factory(options)
    if options.input:
        made.example_inputs, made.kwargs = tuple(example(text) for text in options.input), {}
    if made.example_inputs is None:
        cure = "" if is_program else "Let it return (module, example_inputs), or "
        raise ValueError(
            f"expected example inputs: {options.model} gave none. {cure}"
            f"{'Pass' if is_program else 'pass'} --input 1x3x224x224."
        )
    return made


def _of_program(options: Any) -> Made:
    if options.checkpoint is not None:
        raise ValueError("expected --checkpoint with a factory only: a program has its weights.")
    found, module = program.load(Path(options.model))
    inputs, kwargs = found.example_inputs or (None, {})
    return Made(options.model, module, inputs, dict(kwargs), found)


def _of_factory(options: Any) -> Made:
    given = _factory(options.model)()
    module, inputs = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected {options.model} to return a torch.nn.Module or (module, example_inputs), "
            f"got {type(given).__name__}."
        )
    if options.checkpoint is not None:
        _load(module, options.checkpoint)
    module.eval()
    if isinstance(inputs, Mapping):
        return Made(options.model, module, (), dict(inputs))
    return Made(options.model, module, inputs)


def example(text: str) -> Tensor:
    """An input of zeros.

    Example:
        >>> example("1x3x2"), example("1x2:int64")
        (tensor([[[0., 0.],
                  [0., 0.],
                  [0., 0.]]]), tensor([[0, 0]]))
    """
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    sizes = shape.split("x")
    if not isinstance(dtype, torch.dtype) or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"expected --input such as 1x3x224x224 or 1x16:int64, got {text!r}.")
    return torch.zeros([int(size) for size in sizes], dtype=dtype)


def _factory(given: str) -> Any:
    """The function that package.module:factory names."""
    module_name, _, name = given.partition(":")
    if "" not in sys.path:  # as python -m does: modules of the current folder
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f"expected a module {module_name!r} that Python can import from here, got none. Run "
            "lap-ext in its folder, or set PYTHONPATH."
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"expected {part!r} in {module_name!r}, got a module without it.")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"expected {given} to be a function, got {type(found).__name__}.")
    return found


def _load(module: nn.Module, path: Path) -> None:
    """Weights from a safetensors file: each tensor of the module and no other."""
    if path.suffix in _PICKLES:
        raise ValueError(
            f"expected --checkpoint to be a safetensors file, got {str(path)!r}, which may be a "
            "pickle file. Save its state_dict with safetensors.torch.save_file."
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        missing, unexpected = load_model(module, path, strict=False)
    except SafetensorError as error:
        raise ValueError(
            f"expected a whole safetensors file, got {str(path)!r}: {error}. Download it again."
        ) from None
    except RuntimeError as error:  # shapes
        raise ValueError(f"expected {str(path)!r} to fit the model, got: {error}") from None
    for what, names in (("lacks", sorted(missing)), ("has besides", sorted(unexpected))):
        if names:
            raise ValueError(
                f"expected {str(path)!r} to have exactly the model's tensors, got a file that "
                f"{what} {some(names, 3)}."
            )
