# SPDX-License-Identifier: MIT
"""The definition of lookahead for a full model, by brute force; this file never imports lap_ext.

    score(w)^2 = sum over the positions of w of || next @ (M - M without w) @ prev ||_F^2

M is the layer's own operator, prev is everything that feeds it within one hop, and next is
everything that reads it within one hop.
The model itself is run, in float64. Each call of a weighted function (linear, convolutions,
embedding) returns a fresh leaf instead of its result, so that autograd sees exactly the path from
one weighted layer to the next and finds the neighbors by itself: nothing here knows a topology.

    prev   [inputs of l, ...]   d(input of l)/d(output of p) @ M_p for each call p, side by side
                                (the inputs of the producers are independent), and
                                d(input of l)/d(model's input) where a skip ends there.
    next   [..., outputs of l]  M_n @ d(input of n)/d(output of l) for each call n, stacked; and
                                d(model's output)/d(output of l).

Conventions, where a model is not linear:
    activations, dropout        factor 1
    LayerNorm, RMSNorm, ...     only their weight counts; a batch norm in eval mode is linear anyway
    a * b (GLU, SE)             linearized with both operands at 1: d(ab) = da + db. They count as
                                independent even if one layer makes both: the mean of the squares
                                over da + db and da - db.
    softmax(q k)                q k is a bilinear form of the inputs of W_q and W_k: in addition to
                                `next`, q has the rows d2(q k)/dq dk @ M_k, and k likewise. The
                                softmax itself is a fixed mixing of positions: head h reads position
                                t - h, so that heads that share a key or value reach it at different
                                positions.
    several calls of a weight   (tied, or one module called twice) squares of the calls add

A weight shared by many positions counts as one entry of the unrolled operator: only one output
position of each consumer is looked at (the middle one of a convolution, the last one otherwise).
A consumer of several positions of one channel, such as a linear layer after a flatten, then sees
all of them, and a window all its taps if the image leaves room around the middle.
`positions="all"` looks at every one; right where a producer fills the positions of a channel with
rows of its own (unflatten, pixel shuffle), or with a single position.

Two ways from ONE layer to one channel without a weighted layer between them (x + pool(x), or the
sum of two halves of a layer's output) are added before they are squared, as the operator has it;
lap_ext adds squares: such models are not for here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

WINDOWED = {
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
MATMULS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__}  # weights kept as [in, out]
WEIGHTED = {F.linear, F.embedding} | WINDOWED | MATMULS
ACTIVATIONS = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid),
    *(F.sigmoid, F.tanh, F.softplus, F.hardtanh, F.dropout),
    *(
        torch.relu,
        torch.prelu,
        F.prelu,
        torch.sigmoid,
        torch.tanh,
        torch.relu_,
        Tensor.relu,
        Tensor.sigmoid,
    ),
    *(Tensor.tanh, Tensor.relu_, Tensor.clamp),
}
NORMS = {F.layer_norm, F.rms_norm, F.group_norm, F.instance_norm}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__}
ROOTS = {torch.rsqrt, Tensor.rsqrt}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}


@dataclass
class Call:
    """One call of a weighted function: y = apply(x, weight), without the bias."""

    name: str
    weight: Tensor  # the full parameter, though the call may use a view of it
    apply: Callable[[Tensor, Tensor], Tensor]
    x: Tensor | None  # as it came; None: the tokens of the model, the size is `one_input`'s
    one_input: tuple[int, ...]  # the shape that `apply` takes
    y: Tensor  # the leaf that was handed on
    one_position: Tensor  # indices of the outputs at one position

    def operator(self, weight: Tensor | None = None) -> Tensor:
        """The matrix [outputs, inputs], column by column."""
        used = self.weight if weight is None else weight
        size = torch.Size(self.one_input).numel()
        units = torch.eye(size, dtype=torch.float64).reshape(size, *self.one_input)
        return torch.vmap(lambda unit: self.apply(unit, used))(units).flatten(1).T


def one_position(func: Any, y: Tensor) -> Tensor:
    """Indices of the outputs that count where this is a consumer, of a batch of one."""
    index = torch.arange(y.numel()).reshape(y.shape)
    if func in WINDOWED:  # [1, channels, *image]
        return index[(0, slice(None), *(size // 2 for size in y.shape[2:]))]
    if func is torch.bmm:  # [experts, positions, channels]
        return index[:, -1].flatten()
    return index.reshape(-1, y.shape[-1])[-1]


class Recorder(TorchFunctionMode):
    """Cuts the model at its weighted calls and linearizes what lies between them."""

    def __init__(self, model: nn.Module, sign: float):
        super().__init__()
        self.parameters = {
            x.untyped_storage().data_ptr(): (name.removesuffix(".weight"), x)
            for name, x in model.named_parameters()
        }
        self.sign = sign  # of the second operand of a product
        self.products = 0
        self.calls: list[Call] = []
        self.forms: list[Tensor] = []  # the logits: bilinear forms [..., queries, keys]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.addmm:  # GPT-2's Conv1D
            return self.weighted(torch.matmul, args[1:], kwargs)
        if func in WEIGHTED and self.owner(args[1]):
            return self.weighted(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self.multi_head(*args, **kwargs)
        if func in ACTIVATIONS:
            return args[0].clone()
        if func in ROOTS:  # of the mean square, in an RMSNorm written out
            return torch.ones_like(args[0], requires_grad=False)
        if func in PRODUCTS and all(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self.product(*args)
        if func is F.glu:
            return self.product(*args[0].chunk(2, kwargs.get("dim", -1)))
        if func in NORMS:
            return self.affine(func, args, kwargs)
        if func in SOFTMAXES:
            return self.mixing(args[0])
        if func is F.scaled_dot_product_attention:
            return self.attention(*args[:3])
        return func(*args, **kwargs)

    def owner(self, x: Tensor) -> tuple[str, Tensor] | None:
        """The layer and the parameter that x is a view of."""
        return self.parameters.get(x.untyped_storage().data_ptr())

    def weighted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Remembers the input, answers with a leaf that has the values of the output."""
        x, view, *rest = args
        owner = self.owner(view)
        assert owner, "a weight must be a view of a parameter"
        y = func(*args, **kwargs).detach().requires_grad_()
        one_input, options = tuple(x.shape), {k: v for k, v in kwargs.items() if k != "bias"}
        if func is F.embedding:  # of one-hot rows
            func, one_input, options = torch.matmul, (*x.shape, view.shape[0]), {}
        strides = (view.shape, view.stride(), view.storage_offset())
        rest[:1] = [None] * (func not in MATMULS)  # no bias

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            return func(x, weight.as_strided(*strides), *rest, **options)

        carried = x.clone() if x.requires_grad else None  # the model may write into x
        self.calls.append(Call(*owner, apply, carried, one_input, y, one_position(func, y)))
        return y.clone()  # not the leaf itself: the model may write into it

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The gate and what it lets through."""
        self.products += 1
        return a + self.sign * b

    def affine(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A norm that does not normalize. F.layer_norm's and F.rms_norm's weight is their third."""
        index = {F.layer_norm: 2, F.rms_norm: 2, F.group_norm: 2, F.instance_norm: 3}[func]
        weight = args[index] if len(args) > index else kwargs.get("weight")
        if weight is None:
            return args[0].clone()
        if func in (F.group_norm, F.instance_norm):
            weight = weight.reshape(-1, *[1] * (args[0].dim() - 2))
        return args[0] * weight

    def mixing(self, logits: Tensor) -> Tensor:
        """What the softmax of [..., queries, keys] becomes; the logits are remembered."""
        self.forms.append(logits)
        queries, keys = logits.shape[-2:]
        heads = logits.shape[1:-2].numel()
        reads = torch.arange(queries) - torch.arange(heads)[:, None]
        mix = F.one_hot(reads % keys, keys).double()
        return mix.reshape(1, *logits.shape[1:]).expand(logits.shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, heads, positions, features], fewer heads for k and v when they are grouped."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return self.mixing(q @ k.mT) @ v

    def multi_head(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """nn.MultiheadAttention of one sequence [positions, 1, features] with itself."""
        heads, (in_weight, in_bias), (out_weight, out_bias) = args[3], args[4:6], args[10:12]
        with self:
            packed = F.linear(x, in_weight, in_bias)  # [positions, 1, 3 * features]
            q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4)
            y = self.attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
            return F.linear(y, out_weight, out_bias), None


def jacobians(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """d y / d leaf as a matrix [y.numel(), leaf.numel()]; zeros where y does not depend on it."""
    gradients: Any = [None] * len(leaves)
    if y.requires_grad and leaves:
        units = torch.eye(y.numel(), dtype=torch.float64).reshape(-1, *y.shape)
        gradients = torch.autograd.grad(
            y, leaves, units, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    return [
        torch.zeros(y.numel(), leaf.numel(), dtype=torch.float64)
        if rows is None
        else rows.flatten(1)
        for leaf, rows in zip(leaves, gradients, strict=True)
    ]


@dataclass
class Run:
    """A model split into its calls."""

    calls: list[Call]
    inputs: list[Tensor]  # leaves
    outputs: list[Tensor]  # of the model
    forms: list[Tensor]  # logits that count, each a scalar
    positions: str
    products: int

    def __post_init__(self) -> None:
        self.operators = [call.operator() for call in self.calls]
        self.leaves = [call.y for call in self.calls]

    def prev(self, layer: Call) -> Tensor:
        """[inputs of the layer, all inputs of its producers]."""
        if layer.x is None:  # it reads the model's tokens
            return torch.eye(torch.Size(layer.one_input).numel(), dtype=torch.float64)
        ways = jacobians(layer.x, self.leaves)
        parts = [way @ operator for way, operator in zip(ways, self.operators, strict=True)]
        return torch.cat([*jacobians(layer.x, self.inputs), *parts], dim=1)

    def next(self, layer: Call) -> Tensor:
        """[all outputs of its consumers, outputs of the layer]."""
        parts = [way for output in self.outputs for way in jacobians(output, [layer.y])]
        for call, operator in zip(self.calls, self.operators, strict=True):
            if call.x is not None:
                seen = call.one_position if self.positions == "one" else slice(None)
                parts += [operator[seen] @ way for way in jacobians(call.x, [layer.y])]
        return torch.cat([*parts, *self.bilinear(layer)], dim=0)

    def bilinear(self, layer: Call) -> list[Tensor]:
        """d2(form) / d(output of the layer) d(input of another): [inputs, outputs of the layer]."""
        parts = []
        for form in self.forms:
            (slope,) = torch.autograd.grad(form, layer.y, create_graph=True, allow_unused=True)
            if slope is not None and slope.requires_grad:
                ways = jacobians(slope, self.leaves)
                parts += [(way @ op).T for way, op in zip(ways, self.operators, strict=True)]
        return [part for part in parts if part.any()]

    def squared_norms(self, layer: Call) -> Tensor:
        """The squared score of every weight of one call."""
        before, after = self.prev(layer), self.next(layer)
        full = layer.operator()
        result = torch.zeros(layer.weight.numel(), dtype=torch.float64)
        for index in range(layer.weight.numel()):
            without = layer.weight.flatten().clone()
            without[index] = 0
            change = full - layer.operator(without.reshape(layer.weight.shape))
            for o, i in change.nonzero().tolist():  # after @ this entry alone @ before
                product = torch.outer(after[:, o] * change[o, i], before[i])
                result[index] += product.square().sum()
        return result.reshape(layer.weight.shape)


def _counted(form: Tensor, pairs: str) -> Tensor:
    """The logits whose squares make a score."""
    return form[-1, ..., -1, -1] if pairs == "last" else form / form.shape[-2:].numel() ** 0.5


def cut(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    positions: str,
    pairs: str,
    read: Callable[[Any], Any],
    sign: float = 1.0,
) -> Run:
    """Runs a copy of the model, in float64 and eval mode."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    leaves = [x.detach().clone() for x in inputs]
    leaves = [x.double().requires_grad_() if x.is_floating_point() else x for x in leaves]
    with Recorder(model, sign) as recorder:
        outputs = pytree.tree_leaves(model(*leaves))
    outputs = [read(y) for y in outputs if isinstance(y, Tensor) and y.requires_grad]
    counted = [_counted(form, pairs) for form in recorder.forms]
    forms = [scalar for x in counted if x.requires_grad for scalar in x.flatten()]
    floats = [x for x in leaves if x.requires_grad]
    return Run(recorder.calls, floats, outputs, forms, positions, recorder.products)


def distortions(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    positions: str = "one",
    pairs: str = "last",
    read: Callable[[Tensor], Tensor] = lambda y: y,
) -> dict[str, Tensor]:
    """The score of every weight by the definition: layer -> tensor of the weight's shape, float64.

    Args:
        model: any module; a batch of one. Every weighted layer must be a call of its parameter.
        example_inputs: floating tensors are inputs of the first layers, integers are tokens.
        positions: "one" output position of each consumer, or "all".
        pairs: of a query and a key position: the "last" one counts, or the "mean" of all, which
            differs where the positions rotate q and k.
        read: the one position of the model's output that counts, where it has several.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    runs = [cut(model, inputs, positions, pairs, read)]
    if runs[0].products:
        runs.append(cut(model, inputs, positions, pairs, read, sign=-1.0))
    totals: dict[str, Tensor] = {}
    for run in runs:
        for call in run.calls:
            totals[call.name] = totals.get(call.name, 0) + run.squared_norms(call) / len(runs)
    return {name: total.sqrt() for name, total in totals.items()}


# ---- formulas, for models worked by hand ------------------------------------------------------
def rows(weight: Tensor) -> Tensor:
    """Squared norms by output."""
    return weight.square().flatten(1).sum(1)


def columns(weight: Tensor) -> Tensor:
    """Squared norms by input."""
    return weight.square().transpose(0, 1).flatten(1).sum(1)


def scored(weight: Tensor, ins: Tensor | float, outs: Tensor | float) -> Tensor:
    """|w| * sqrt(ins [I]) * sqrt(outs [O]), both squared norms."""
    ins, outs = (torch.as_tensor(x, dtype=torch.float64) for x in (ins, outs))
    tail = [1] * (weight.dim() - 2)
    return weight.abs() * ins.sqrt().reshape(1, -1, *tail) * outs.sqrt().reshape(-1, 1, *tail)
