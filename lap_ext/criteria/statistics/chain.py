# SPDX-License-Identifier: MIT
"""A traced chain of layers as an nn.Sequential of plain modules with copies of the weights.

BackPACK differentiates twice through a sequence of modules that it supports. So functions become
modules, and dropout and casts are removed. A batch norm in evaluation mode becomes a frozen
convolution of size 1 (a linear layer for [N, C]) that scales and shifts; average pooling becomes a
frozen convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import skip_init

from lap_ext.errors import LapValueError
from lap_ext.ops.reference.common import exact_sqrt, score_dtype
from lap_ext.topology import Topology
from lap_ext.topology.call import Call, bind, mapped, module_path
from lap_ext.topology.export import first_names, named_tensors, placeholders

# (the call, with tensors for all but activations) -> a module; None: an identity
Build: TypeAlias = Callable[[Call], "nn.Module | None"]
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


@dataclass(frozen=True)
class Chain:
    """A copy of a model, and the copy of each layer's weight in it."""

    model: nn.Sequential
    weights: dict[str, nn.Parameter]  # layer name -> the copy of its weight


def chain_of(topology: Topology, program: ExportedProgram) -> Chain:
    """Copies the chain of layers that a program of the model runs.

    Raises:
        ValueError: the model joins or splits, or has an operation without a module in `_BUILD`;
            the message names its module.
    """
    tensors, first = named_tensors(topology.model), first_names(topology.model)
    names: dict[fx.Node, str] = {}
    fixed: dict[fx.Node, Any] = {}
    current: fx.Node | None = None
    modules: list[nn.Module] = []
    weights: dict[str, nn.Parameter] = {}
    given = iter(placeholders(program))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind, name, _ = next(given)
            if kind in ("parameter", "buffer"):
                names[node], fixed[node] = first.get(name, name), tensors[name].detach()
            elif isinstance(node.meta.get("val"), Tensor) and kind == "input":
                if current is not None:
                    raise _unfit(topology, node, "a second input")
                current = node
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            activations = [x for x in node.all_input_nodes if x not in fixed]
            if activations != [current]:
                raise _unfit(topology, node, "a join, a split or a computed weight")
            module = _module(topology, node, fixed)
            current = node
            if module is None:
                continue
            modules.append(module)
            weight = next((x for x in node.all_input_nodes if x in names), None)
            if weight is not None:
                _record_weight(topology, node, names[weight], module, weights)
        elif node.op == "output" and list(node.args[0]) != [current]:
            raise _unfit(topology, node, "several outputs")
    return Chain(nn.Sequential(*modules), weights)


def _record_weight(
    topology: Topology,
    node: fx.Node,
    parameter: str,
    module: nn.Module,
    weights: dict[str, nn.Parameter],
) -> None:
    """Records which layer's weight a module copies; a frozen module is no layer."""
    name = next((n for n, x in topology.layers.items() if x.parameter == parameter), None)
    weight = module.weight
    if name is None or not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return
    if name in weights:
        raise _unfit(topology, node, f"a second use of weight {name!r}")
    weights[name] = weight


def _module(topology: Topology, node: fx.Node, fixed: dict[fx.Node, Any]) -> nn.Module | None:
    def known(x: Any) -> Any:
        return fixed.get(x, x) if isinstance(x, fx.Node) else x

    call = bind(node, mapped(node.args, known), mapped(dict(node.kwargs), known))
    build = _BUILD.get(call.name)
    if build is None:
        raise _unfit(topology, node, str(node.target))
    try:
        return build(call)
    except _NotInChain as reason:
        raise _unfit(topology, node, str(reason)) from None


class _NotInChain(Exception):  # noqa: N818 (caught right above)
    """An operation that has no module; the text describes it."""


def _unfit(topology: Topology, node: fx.Node, what: str) -> ValueError:
    path = module_path(node)
    where = f"in module {path!r}" if path else f"in {type(topology.model).__name__}.forward"
    if path:
        where += f" ({type(topology.model.get_submodule(path)).__name__})"
    return LapValueError(
        (
            "a chain of layers that BackPACK can differentiate twice (linear, convolution, "
            "pooling, flatten, activation, batch norm)"
        ),
        f"{what} {where}",
        'Use criterion="weight_gradient" or one without data for this model.',
    )


def _linear(call: Call) -> nn.Module:
    weight, bias = _floats(call["weight"]), call["bias"]
    module = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(module, weight, bias)


def _convolution(call: Call) -> nn.Module:
    weight, bias = _floats(call["weight"]), call["bias"]
    n = weight.dim() - 2
    window, dilation = tuple(weight.shape[2:]), _each(call["dilation"], n)
    padding = call["padding"]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if any((k - 1) * d % 2 for k, d in zip(window, dilation, strict=True)):
            raise _NotInChain("one-sided padding")
        padding = [(k - 1) * d // 2 for k, d in zip(window, dilation, strict=True)]
    groups = call["groups"]
    module = skip_init(
        _CONV[n],
        weight.shape[1] * groups,
        weight.shape[0],
        window,
        _each(call["stride"], n),
        _each(padding, n),
        dilation,
        groups,
        bias is not None,
    )
    return _filled(module, weight, bias)


def _transposed(call: Call) -> nn.Module:
    weight, bias = _floats(call["weight"]), call["bias"]
    n, groups = weight.dim() - 2, call["groups"]
    module = skip_init(
        _TRANSPOSED[n],
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        _each(call["stride"], n),
        _each(call["padding"], n),
        _each(call["output_padding"], n),
        groups,
        bias is not None,
        _each(call["dilation"], n),
    )
    return _filled(module, weight, bias)


def _batch_norm(call: Call) -> nn.Module:
    if call["running_var"] is None or call["training"]:
        raise _NotInChain("a batch norm without running statistics")
    mean, variance = _floats(call["running_mean"]), _floats(call["running_var"])
    scale, shift = 1.0 / exact_sqrt(variance + call["eps"]), torch.zeros_like(mean)
    scale = scale if call["weight"] is None else scale * _floats(call["weight"])
    shift = (shift if call["bias"] is None else _floats(call["bias"])) - mean * scale
    n, channels = len(call.shape) - 2, mean.numel()
    if n == 0:
        module = _filled(skip_init(nn.Linear, channels, channels), torch.diag(scale), shift)
    else:
        module = skip_init(_CONV[n], channels, channels, 1, groups=channels)
        module = _filled(module, scale.reshape(-1, *[1] * (n + 1)), shift)
    return module.requires_grad_(False)


def _reshape(call: Call) -> nn.Module | None:
    before, after = _shape(call), call.shape
    if before == after:
        return None
    if len(after) != 2 or before[0] != after[0]:
        raise _NotInChain(f"a reshape from {list(before)} to {list(after)}")
    return nn.Flatten()


def _dropout(call: Call) -> None:
    if call["train"] and call["p"] > 0:
        raise _NotInChain("dropout that is on in evaluation mode")


def _max_pool(call: Call) -> nn.Module:
    n = int(call.name[len("max_pool")])
    window, stride = call["kernel_size"], call["stride"] or call["kernel_size"]
    return _MAX_POOL[n](
        _each(window, n),
        _each(stride, n),
        _each(call["padding"], n),
        _each(call["dilation"], n),
        ceil_mode=call["ceil_mode"],
    )


def _average(call: Call) -> nn.Module:
    """Builds average pooling as a frozen convolution (BackPACK supports it in float32 only)."""
    n = len(call.shape) - 2
    before = _shape(call)
    if call.name.startswith("adaptive"):
        window = tuple(a // b for a, b in zip(before[2:], call.shape[2:], strict=True))
        stride, padding = window, (0,) * n
        if any(a % b for a, b in zip(before[2:], call.shape[2:], strict=True)):
            raise _NotInChain("windows of different sizes")
    else:
        window = _each(call["kernel_size"], n)
        stride = _each(call["stride"] or window, n)
        padding = _each(call["padding"], n)
        uneven = any(padding) and not call["count_include_pad"]
        if uneven or call["ceil_mode"] or call.get("divisor_override") is not None:
            raise _NotInChain("windows of different sizes")
    result = call.node.meta["val"]
    options = {"groups": before[1], "bias": False, "dtype": score_dtype(result.dtype)}
    module = skip_init(_CONV[n], before[1], before[1], window, stride, padding, **options)
    module.weight.data.fill_(1.0 / torch.Size(window).numel())
    return module.to(result.device).requires_grad_(False)


def _cast(call: Call) -> None:
    if not call.node.meta["val"].is_floating_point():
        raise _NotInChain(f"a cast to {call.node.meta['val'].dtype}")


def _shape(call: Call) -> tuple[int, ...]:
    source = call.node.all_input_nodes[0].meta["val"]
    return tuple(map(int, source.shape))


def _floats(x: Any) -> Tensor:
    """Copies a tensor to float32 (float64 stays float64)."""
    if not isinstance(x, Tensor):
        raise _NotInChain("a computed weight")
    return x.detach().to(score_dtype(x.dtype), copy=True)


def _filled(module: nn.Module, weight: Tensor, bias: Any) -> nn.Module:
    module.weight = nn.Parameter(weight)
    if module.bias is not None:
        module.bias = nn.Parameter(_floats(bias), requires_grad=False)
    return module


def _each(x: Any, n: int) -> tuple[int, ...]:
    values = tuple(x) if isinstance(x, (list, tuple)) else (x,)
    return values * n if len(values) == 1 else values


_BUILD: dict[str, Build] = {
    "linear": _linear,
    **{f"conv{n}d": _convolution for n in _CONV},
    **{f"conv_transpose{n}d": _transposed for n in _TRANSPOSED},
    "batch_norm": _batch_norm,
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view"), _reshape),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), _dropout),
    **dict.fromkeys(("to", "_to_copy", "contiguous", "clone", "alias"), _cast),
    **{f"max_pool{n}d": _max_pool for n in _MAX_POOL},
    **{f"{kind}avg_pool{n}d": _average for kind in ("", "adaptive_") for n in _CONV},
    "relu": lambda call: nn.ReLU(),
    "sigmoid": lambda call: nn.Sigmoid(),
    "tanh": lambda call: nn.Tanh(),
    "selu": lambda call: nn.SELU(),
    "log_sigmoid": lambda call: nn.LogSigmoid(),
    "elu": lambda call: nn.ELU(call["alpha"]),
    "leaky_relu": lambda call: nn.LeakyReLU(call["negative_slope"]),
}
