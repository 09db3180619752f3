# SPDX-License-Identifier: MIT
"""The argument MODEL: a checkpoint directory, or the module that a factory returns.

No file is loaded that can execute code: weights come from safetensors files. A pickle file or a
torch.export program is refused without being opened; whoever trusts one loads it in a factory.
torch is imported where a module is made, so that a wrong MODEL is told at once.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lap_ext._text import some
from lap_ext.cli.output import Progress
from lap_ext.cli.parser import WITH_DATA
from lap_ext.errors import (
    LapFileNotFoundError,
    LapImportError,
    LapTypeError,
    LapValueError,
    callback,
)
from lap_ext.options import OnUnsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lap_ext.topology import Topology

_PROGRAM = ".pt2"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar"}
_HUB_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_KINDS = "a checkpoint directory or package.module:factory"


@dataclass
class Made:
    """A module with its weights, made by a factory, and inputs for the trace.

    Attributes:
        name: MODEL as it was given.
        module: in evaluation mode.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of named ones.
    """

    name: str
    module: nn.Module
    example_inputs: Any

    def trace(self, on_unsupported: OnUnsupported) -> Topology:
        """Finds the neighbors of each layer."""
        from lap_ext.topology import trace

        return trace(self.module, self.example_inputs, on_unsupported=on_unsupported)


def is_directory(options: Any) -> bool:
    """Tells whether MODEL is a checkpoint directory; ValueError if it is of no known kind."""
    given = options.model
    path = Path(given)
    if path.is_dir():
        if options.checkpoint:
            raise LapValueError(
                "{argument} with a factory only", "a checkpoint directory", argument="checkpoint"
            )
        return True
    if path.suffix == _PROGRAM:
        raise LapValueError(
            _KINDS,
            f"the program {given!r}, which can execute any code when it is loaded",
            "If you trust it, write a factory: program = torch.export.load(path); "
            "return program.module(), program.example_inputs[0].",
        )
    if path.suffix in _PICKLES:
        raise LapValueError(
            _KINDS,
            f"the pickle file {given!r}, which can execute any code when it is loaded",
            "Save its state_dict with safetensors.torch.save_file and pass that as {argument} "
            "of a factory.",
            argument="checkpoint",
        )
    if path.suffix == ".safetensors":
        raise LapValueError(
            _KINDS,
            f"the file {given!r}, which does not say how its weights are connected",
            "Pass its directory, or a factory with {argument}.",
            argument="checkpoint",
        )
    module, colon, name = given.partition(":")
    if not (colon and name and all(part.isidentifier() for part in module.split("."))):
        raise LapValueError(_KINDS, f"{given!r}, and no such directory", _of_the_hub(options))
    return False


def _of_the_hub(options: Any) -> str:
    """Says how to fetch a model whose name on the Hugging Face Hub was given, perhaps."""
    owner_and_name = options.model.split("/")
    if len(owner_and_name) > 2 or not all(map(_HUB_NAME.fullmatch, owner_and_name)):
        return ""
    directory = f"./{owner_and_name[-1]}"
    return (
        f"If it is a model of the Hugging Face Hub, run: hf download {options.model} --local-dir "
        f"{directory}, then lap-ext {options.subcommand} {directory}."
    )


def scoring_options(options: Any) -> dict[str, Any]:
    """Gathers the options of scoring, as lap_ext.prune and lap_ext.scores take them."""
    names = ("criterion", "normalize", "layers", "exclude", "batch_norm", "data")
    return {name: getattr(options, name) for name in names}


def check_statistics(options: Any) -> None:
    """Raises unless there are statistics where the criterion needs some, and only there."""
    needed, path = options.criterion in WITH_DATA, options.data
    if needed and path is None:
        raise LapValueError(
            f"{{argument}} for criterion {options.criterion!r}",
            "none",
            f"In Python, lap_ext.criteria.measure(model, inputs, {options.criterion!r}, batches) "
            "computes them, and safetensors.torch.save_file saves them.",
            argument="data",
        )
    if path is not None and not needed:
        raise LapValueError(
            f"no {{argument}} for criterion {options.criterion!r}, which reads weights only",
            repr(str(path)),
            argument="data",
        )
    if path is not None and not path.is_file():
        raise LapFileNotFoundError("{argument} to be a file", repr(str(path)), argument="data")


def traced(options: Any, progress: Progress) -> tuple[Made, Topology]:
    """Makes the module of a factory, and traces it."""
    if getattr(options, "memory", None) is not None:
        raise LapValueError(
            "{argument} with a checkpoint directory only (the module of a factory is in memory)",
            argument="memory",
        )
    progress.step(f"make {options.model}")
    made = make(options)
    progress.step("trace")
    return made, made.trace(options.on_unsupported)


def make(options: Any) -> Made:
    """Makes the module of a factory, with the weights of --checkpoint and the inputs of --input."""
    from torch import nn

    with callback():
        returned = _factory(options.model)()
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    module, inputs = returned if is_pair else (returned, None)
    if not isinstance(module, nn.Module):
        raise LapTypeError(
            f"{options.model} to return a torch.nn.Module or (module, example_inputs)",
            type(returned).__name__,
        )
    if options.checkpoint is not None:
        _load(module, options.checkpoint)
    for part in module.modules():
        part.training = False  # the module of an exported program raises an error at eval()
    if options.input:
        inputs = examples(options.input)
    if inputs is None:
        raise LapValueError(
            "example inputs",
            f"none from {options.model}",
            "Let it return (module, example_inputs), or pass {argument} 1x3x224x224.",
            argument="input",
        )
    return Made(options.model, module, inputs)


def examples(texts: Sequence[str]) -> tuple[Tensor, ...] | dict[str, Tensor] | None:
    """Makes inputs of zeros: positional ones, or named ones if all have a name; None for no texts.

    Example:
        >>> list(examples(["input_ids=1x8:int64", "pixel_values=1x3x8x8"]))
        ['input_ids', 'pixel_values']
        >>> len(examples(["1x8", "1x4"])), examples([])
        (2, None)
    """
    named = ["=" in text for text in texts]
    if any(named) and not all(named):
        raise LapValueError(
            "a name for all of {argument} or for none", ", ".join(texts), argument="input"
        )
    if all(named):
        pairs = (text.split("=", 1) for text in texts)
        return {name: example(shape) for name, shape in pairs} or None
    return tuple(map(example, texts))


def example(text: str) -> Tensor:
    """Makes an input of zeros.

    Example:
        >>> example("1x3x2"), example("1x2:int64")
        (tensor([[[0., 0.],
                  [0., 0.],
                  [0., 0.]]]), tensor([[0, 0]]))
    """
    import torch

    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    sizes = shape.split("x")
    if not isinstance(dtype, torch.dtype) or not all(size.isdecimal() for size in sizes):
        raise LapValueError(
            "{argument} such as 1x3x224x224, 1x16:int64 or input_ids=1x16:int64",
            repr(text),
            argument="input",
        )
    return torch.zeros([int(size) for size in sizes], dtype=dtype)


def _factory(given: str) -> Any:
    """Imports the function that package.module:factory names."""
    module_name, _, name = given.partition(":")
    if "" not in sys.path:  # as python -m does: modules of the current directory
        sys.path.insert(0, "")
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise
        raise LapImportError(
            f"a module {module_name!r} that Python can import from here",
            "none",
            "Run lap-ext in the directory of the module, or set PYTHONPATH.",
        ) from None
    for part in name.split("."):
        if not hasattr(value, part):
            raise LapValueError(f"{part!r} in {module_name!r}", "a module without it")
        value = getattr(value, part)
    if not callable(value):
        raise LapTypeError(f"{given} to be a function", type(value).__name__)
    return value


def _load(module: nn.Module, path: Path) -> None:
    """Loads weights from a safetensors file, which must have exactly the tensors of the module."""
    if path.suffix in _PICKLES:
        raise LapValueError(
            "{argument} to be a safetensors file",
            f"{str(path)!r}, which may be a pickle file",
            "Save its state_dict with safetensors.torch.save_file.",
            argument="checkpoint",
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not path.exists():
        raise LapFileNotFoundError(
            "{argument} to be a file that exists", repr(str(path)), argument="checkpoint"
        )
    if not path.is_file():
        raise LapValueError(
            "{argument} to be a file", f"{str(path)!r}, which is none", argument="checkpoint"
        )
    try:
        _check_dtypes(module, path)
        missing, unexpected = load_model(module, path, strict=False)
    except SafetensorError as error:
        raise LapValueError(
            "{argument} to be a complete safetensors file",
            f"{str(path)!r}: {error}",
            "Download it again.",
            argument="checkpoint",
        ) from None
    except RuntimeError as error:  # shapes
        raise LapValueError(
            "{argument} to fit the model",
            f"{str(path)!r}: {str(error).rstrip('.')}",
            argument="checkpoint",
        ) from None
    for relation, names in (("lacks", sorted(missing)), ("also has", sorted(unexpected))):
        if names:
            raise LapValueError(
                "{argument} to have exactly the tensors of the model",
                f"{str(path)!r}, which {relation} {some(names, 3)}",
                argument="checkpoint",
            )


def _check_dtypes(module: nn.Module, path: Path) -> None:
    """Raises where loading would turn the numbers of a tensor into other ones."""
    from safetensors import safe_open
    from torch import Tensor

    from lap_ext.checkpoint.files import DTYPES

    own = {name: x.dtype for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    with safe_open(path, framework="pt") as file:
        for name in sorted(own.keys() & set(file.keys())):
            stored = file.get_tensor(name).dtype  # mapped into memory, not read
            if stored != own[name] and not {stored, own[name]} <= set(DTYPES.values()):
                wanted, got = (str(x).removeprefix("torch.") for x in (own[name], stored))
                raise LapTypeError(
                    f"{name!r} as {wanted}, as the model has it",
                    f"{got} in {str(path)!r}",
                    "Dequantize or convert it first.",
                )
