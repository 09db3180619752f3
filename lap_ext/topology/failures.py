# SPDX-License-Identifier: MIT
"""Why torch.export could not follow a model: where it failed, and what helps against that failure.

The place is the innermost module and the innermost line of Python outside PyTorch.
"""

from __future__ import annotations

import inspect
import logging
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from lap_ext.errors import LapTypeError, TopologyError

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_BY_VALUE = (GuardOnDataDependentSymNode, DataDependentOutputException)
_LONGEST = 300  # letters of an error's first line, of a signature
_PLAIN = (Tensor, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)


def check_inputs(model: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Raises unless forward takes these arguments, and all of them are tensors or plain values."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        raise TopologyError(
            f"inputs for {type(model).__name__}.forward{_shown(signature)}",
            f"{len(args)} positional and {list(named) or 'no'} named ones: {error}",
            "Pass a tuple of positional arguments, or a dict of named ones.",
        ) from None
    for leaf in pytree.tree_leaves((args, dict(named))):
        if not isinstance(leaf, _PLAIN):
            raise LapTypeError(
                "inputs of tensors, numbers, texts, and lists and dicts of them",
                f"a {type(leaf).__module__}.{type(leaf).__qualname__}",
                "Make a tensor of it (torch.as_tensor), or pass the tensors in it.",
            )


def failure(model: nn.Module, error: Exception) -> TopologyError:
    """Makes the error that says where torch.export failed in a model, and why."""
    place = _place(model, error.__traceback__)
    if isinstance(error, _BY_VALUE):
        return TopologyError(
            "a path through the model that does not depend on the values of tensors",
            f"a decision on such a value{place}",
            "Use torch.where there, or decide outside of forward and pass the decision as an "
            "argument that is no tensor (a bool or a number).",
        )
    line = str(error).strip().split("\n")[0][:_LONGEST].removesuffix(".")
    return TopologyError(
        "a model that torch.export can follow with these example_inputs",
        f"{type(error).__name__}: {line}{place}",
        "If the model does not run on these inputs either, pass others (a tuple for positional, a "
        "dict for named ones). If it does, write that line with operations of PyTorch on tensors "
        "(no NumPy, no custom kernels).",
    )


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Drops what PyTorch logs in this thread, such as graphs in which an export has failed."""
    thread = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(x) for x in list(logging.root.manager.loggerDict) if _is_torch(x)]
    for logger in loggers:
        logger.addFilter(others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(others)


def _is_torch(logger: str) -> bool:
    return logger.split(".", 1)[0] == "torch"


def _shown(signature: inspect.Signature) -> str:
    """Writes the parameters of a function with their defaults, without types."""
    bare = [x.replace(annotation=inspect.Parameter.empty) for x in signature.parameters.values()]
    text = str(inspect.Signature(bare))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...)"


def _place(model: nn.Module, trace: TracebackType | None) -> str:
    """Names the innermost module and line outside of libraries that an error came from."""
    names = {id(module): name for name, module in model.named_modules()}
    module, line = f" in {type(model).__name__}", ""
    for frame, number in traceback.walk_tb(trace):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(id(owner)):
            module = f" in module {names[id(owner)]!r} ({type(owner).__name__})"
        file = frame.f_code.co_filename
        if not file.startswith((*_LIBRARIES, "<")):
            code = traceback.FrameSummary(file, number, frame.f_code.co_name).line
            line = f", {Path(file).name} line {number}: {code}" if code else ""
    return module + line
