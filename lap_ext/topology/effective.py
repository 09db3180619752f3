# SPDX-License-Identifier: MIT
"""Recognizes the weight of an operation where it is no parameter but computed from some.

Whatever depends on parameters, buffers and constants alone is an expression (static.py); where such
an expression is the weight of an operation, its value is what is scored. Three cases differ in how
a mask can be exact:

    factor     w = p * f, and f is independent of p: a mask buffer (weight * mask in a forward,
               torch.nn.utils.prune), a gain, a scale per channel. The layer is the parameter p: the
               weight is zero where p is, so p is set to zero, as everywhere. Where p is multiplied
               by an f that no training changes (buffers, parameters that require no gradient), its
               zeros count as pruned.
    attribute  w = module.weight, which the module computes itself before its forward: weight_norm,
               spectral_norm, everything registered with torch.nn.utils.parametrize. The trace sees
               a parameter of that name in its place (lap_ext/computed), so that all that follows
               is as for any parameter. A mask is registered where the tensor is computed.
    forward    w = f(p) of p's shape, computed in a forward: a standardized weight, p + b @ a. Zeros
               in p are not zeros in w, and no mask can be registered between the computation and
               its use. It is a layer, whose norms count for its neighbors, but pruning it is an
               error that says so.

A weight that no single parameter has the shape of (b @ a) is no layer: the trace refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lap_ext.topology.call import Call, described
from lap_ext.topology.static import Static, names_of
from lap_ext.topology.value import Computation, Value, WeightView

# Products of matrices, which may also compute a weight.
_MATRIX_PRODUCTS = {"matmul", "mm", "mv", "bmm", "addmm", "baddbmm", "einsum", "tensordot"}
# Operations that take from an argument only its shape or dtype.
_CONSTANTS = {"zeros_like": 0, "ones_like": 1, "full_like": 0, "new_zeros": 0, "new_ones": 1,
              "new_full": 0}  # fmt: skip
_AS: dict[str, Any] = {
    "expand_as": torch.ops.aten.expand.default,
    "reshape_as": torch.ops.aten.reshape.default,
    "view_as": torch.ops.aten.reshape.default,
    "type_as": torch.ops.aten.to.dtype,
}


def computes_weight(call: Call) -> bool:
    """Tells whether a matrix product on static values alone computes one, rather than uses one.

    Such as b @ a of two parameters, the estimate of a spectral norm, or DoRA's b(a(eye)).
    """
    if any(x.static is None for x in call.values):
        return False
    if call.name == "linear":  # of a layer that the network uses elsewhere
        used = len(getattr(call.node.args[1], "users", ()))
        return used > 1 and _is_of_identity(call["input"].static)
    if call.name not in _MATRIX_PRODUCTS:
        return False
    of_parameters = [x for x in call.values if x.static is not None and x.static.trainable]
    return len(of_parameters) > 1 or call.name == "mv"


def without_models(call: Call) -> Call:
    """Rewrites an operation that reads only the shape or the dtype of an argument.

    zeros_like(w) and mask.expand_as(w) do not depend on w.
    """
    outcome = call.node.meta["val"]
    if call.name in _CONSTANTS:
        args = (list(call.shape), call.get("fill_value", _CONSTANTS[call.name]))
        kwargs = {"dtype": outcome.dtype, "device": outcome.device}
        return replace(call, name="full", target=torch.full, arguments={}, args=args, kwargs=kwargs)
    if call.name in _AS:
        x, target = call["self"], _AS[call.name]
        like = outcome.dtype if call.name == "type_as" else list(call.shape)
        name, arguments = target.__name__.partition(".")[0], {"self": x, "like": like}
        return replace(
            call, name=name, target=target, arguments=arguments, args=(x, like), kwargs={}
        )
    return call


def view_of(call: Call, expression: Static, tensors: Mapping[str, Tensor]) -> WeightView | None:
    """Returns the view of a parameter that an operation's result is computed from entry by entry.

    Args:
        call: an operation on static values alone.
        expression: its result.
        tensors: the model's parameters and buffers by name.

    Returns:
        None where no argument is a view, of the shape of the result, of a full parameter.
    """
    sources = [x for x in call.values if x.view is not None and _covers(x, call.shape, tensors)]
    if not sources:
        return None
    source = min(sources, key=lambda x: _rank(x, tensors))
    view, others = source.view, [x for x in call.values if x is not source]
    assert view is not None
    full = tuple(tensors[view.parameter].shape)
    before = view.computation or Computation(Static(True, view.parameter))
    factor = _is_factor(call, source, others, view.parameter)
    alive = before.alive
    if factor and call.name == "mul":
        for x in others:
            if x.static is not None and _is_frozen(x.static, tensors):
                args = (x.static, full, tuple(view.meta.shape), view.meta.stride())
                alive = (*alive, Static(target=_alive, args=args))
    computation = Computation(
        Static(True, target=_placed, args=(expression, full, view.meta.stride())),
        before.factor and factor,
        alive,
        before.operation or ("" if factor else described(call)),
    )
    return WeightView(view.parameter, view.meta, None, computation)


def _is_of_identity(x: object) -> bool:
    """Whether an expression begins with an identity matrix, whose image under a layer is w."""
    if isinstance(x, Static):
        return x.target is torch.ops.aten.eye.default or any(map(_is_of_identity, x.args))
    return isinstance(x, (list, tuple)) and any(map(_is_of_identity, x))


def same(a: object, b: object) -> bool:
    """Tells whether two expressions compute the same from the same tensors."""
    if isinstance(a, Static) and isinstance(b, Static):
        return a is b or (
            (a.name, a.target) == (b.name, b.target)
            and (a.tensor is b.tensor or _equal(a.tensor, b.tensor))
            and same(a.args, b.args)
            and same(a.kwargs, b.kwargs)
        )
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _covers(x: Value, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> bool:
    """Whether x shows each entry of a parameter once, in the shape of a result."""
    assert x.view is not None
    meta, full = x.view.meta, tensors[x.view.parameter]
    repeated = any(n > 1 and step == 0 for n, step in zip(meta.shape, meta.stride(), strict=True))
    return (
        tuple(meta.shape) == shape
        and meta.numel() == full.numel()
        and full.dim() > 1
        and not repeated
        and not x.view.routed
    )


def _rank(x: Value, tensors: Mapping[str, Tensor]) -> tuple[bool, bool]:
    """Ranks the parameters of one shape: first one that is trained, then one called weight."""
    assert x.view is not None
    name = x.view.parameter
    return (
        not tensors[name].requires_grad,
        not name.rpartition(".")[2].startswith("weight"),
    )


def _is_factor(call: Call, source: Value, others: list[Value], parameter: str) -> bool:
    """Whether each entry of the result is that of source times something independent of it."""
    if any(parameter in names_of(x.static) for x in others):
        return False
    if call.name == "mul":
        return True
    if call.name in {"div", "neg"}:
        return call["self"] is source
    if call.name == "masked_fill":
        return call["self"] is source and _is_zero(call["value"])
    if call.name == "where":
        return call["condition"] is not source and any(
            _is_zero(call[name]) for name in ("self", "other")
        )
    return False


def _is_zero(x: object) -> bool:
    """Whether an argument is the number 0, or a constant tensor that holds only it."""
    if isinstance(x, (int, float)):
        return x == 0
    if not isinstance(x, Value) or x.static is None or names_of(x.static):
        return False
    constant: Tensor = x.static.value({}, {})
    return not constant.is_meta and not bool(constant.any())


def _is_frozen(x: Static, tensors: Mapping[str, Tensor]) -> bool:
    """Whether training does not change x."""
    return not any(tensors[name].requires_grad for name in names_of(x))


def _placed(x: Tensor, full: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Puts the entries of a view where the parameter has them."""
    result = torch.empty(full, dtype=x.dtype, device=x.device)
    result.as_strided(x.shape, stride).copy_(x)
    return result


def _alive(
    factor: Tensor, full: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """Tells which entries of the parameter a factor leaves."""
    return _placed((factor != 0).expand(shape), full, stride)
