# SPDX-License-Identifier: MIT
"""Small networks whose channels are pruned, and what Torch-Pruning removes from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
import torch_pruning as tp
from torch import Tensor, nn

IMAGE, ROWS, TOKENS = torch.randn(1, 2, 4, 4), torch.randn(1, 5, 3), torch.arange(5)[None] % 7


class Model(nn.Module):
    """Layers by name, and how they are called."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def conv(into: int, out: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, padding=size // 2, **options)


def residual() -> Model:
    def call(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.bn(m.stem(x)))
        x = F.relu(x + m.bn2(m.b(F.relu(m.bn1(m.a(x))))))
        return m.head(F.relu(m.down(x) + m.c(x)).flatten(1))

    return Model(
        call,
        stem=conv(2, 6, bias=False),
        bn=nn.BatchNorm2d(6),
        a=conv(6, 4),
        bn1=nn.BatchNorm2d(4),
        b=conv(4, 6),
        bn2=nn.BatchNorm2d(6),
        down=conv(6, 8, 1),
        c=conv(6, 8),
        head=nn.Linear(8 * 16, 3),
    )


def dense() -> Model:
    def call(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = torch.cat([x, m.b(F.relu(x))], 1)
        return m.head(torch.cat([y, m.c(F.relu(m.bn(y)))], 1))

    return Model(
        call, a=conv(2, 4), b=conv(4, 3), bn=nn.BatchNorm2d(7), c=conv(7, 5), head=conv(12, 2, 1)
    )


def depthwise() -> Model:
    return Model(
        lambda m, x: m.head(F.relu(m.bn(m.d(m.a(x))))),
        a=conv(2, 6, 1),
        d=conv(6, 6, groups=6),
        bn=nn.BatchNorm2d(6),
        head=conv(6, 4, 1),
    )


def grouped() -> Model:
    return Model(
        lambda m, x: m.head(F.relu(m.g(F.relu(m.a(x))))),
        a=conv(2, 8),
        g=conv(8, 4, groups=2),
        head=conv(4, 3),
    )


def transposed() -> Model:
    return Model(
        lambda m, x: m.head(F.relu(m.u(m.a(x)))),
        a=conv(2, 6, 1),
        u=nn.ConvTranspose2d(6, 5, 2, 2),
        head=conv(5, 4, 1),
    )


def onto_itself() -> Model:
    return Model(
        lambda m, x: m.head(y + torch.relu(m.b(y)) if (y := m.a(x)) is not None else y),
        a=nn.Linear(3, 5),
        b=nn.Linear(5, 5),
        head=nn.Linear(5, 2),
    )


def gated() -> Model:
    def call(m: Any, x: Tensor) -> Tensor:
        left, right = m.b(torch.relu(m.a(x))).chunk(2, -1)
        return m.head(left * torch.sigmoid(right))

    return Model(call, a=nn.Linear(3, 4), b=nn.Linear(4, 10), head=nn.Linear(5, 2))


def attention() -> Model:
    def call(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(x + m.mix(x, x, x, need_weights=False)[0])

    mix = nn.MultiheadAttention(4, 1, batch_first=True)
    return Model(call, a=nn.Linear(3, 4), mix=mix, head=nn.Linear(4, 2))


def tied() -> Model:
    def call(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return m.head(x + torch.relu(m.a(x)))

    model = Model(
        call, embed=nn.Embedding(7, 4), a=nn.Linear(4, 4), head=nn.Linear(4, 7, bias=False)
    )
    model.head.weight = model.embed.weight
    return model


def recurrent() -> Model:
    lstm = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
    return Model(
        lambda m, x: m.head(m.lstm(m.a(x))[0]), a=nn.Linear(3, 5), lstm=lstm, head=nn.Linear(12, 2)
    )


def queries() -> Model:
    """Six query heads, two of keys and values, repeated as transformers does it."""

    def heads(m: Any, x: Tensor, repeat: int) -> Tensor:
        x = x.unflatten(-1, (-1, m.width)).transpose(1, 2)
        b, h, t, d = x.shape
        return x if repeat == 1 else x[:, :, None].expand(b, h, repeat, t, d).reshape(b, -1, t, d)

    def call(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        repeat = m.q.weight.shape[0] // m.k.weight.shape[0]  # k.out_features is wrong afterwards
        q, k, v = heads(m, m.q(x), 1), heads(m, m.k(x), repeat), heads(m, m.v(x), repeat)
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return m.head(x + m.o(y.transpose(1, 2).flatten(2)))

    sizes = {"a": (3, 8), "q": (8, 24), "k": (8, 8), "v": (8, 8), "o": (24, 8), "head": (8, 2)}
    model = Model(call, **{name: nn.Linear(*size) for name, size in sizes.items()})
    model.width = 4
    return model


NETS: dict[Callable[[], Model], tuple[Tensor, str]] = {  # inputs, and the roots of groups
    residual: (IMAGE, "stem a b down c"),
    dense: (IMAGE, "a b c"),
    depthwise: (IMAGE, "a d"),
    transposed: (IMAGE, "a u"),
    onto_itself: (ROWS, "a b"),
    gated: (ROWS, "a b"),
    attention: (ROWS, "a"),
    tied: (TOKENS, "a embed"),
    recurrent: (ROWS, "a"),
}
ROOTS = [(make, root) for make, (_, roots) in NETS.items() for root in roots.split()]


def named(x: Any) -> str:
    return x.__name__ if callable(x) else str(x)


def group_of(model: nn.Module, x: Any, root: str, idxs: list[int] | None = None) -> Any:
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    module = model.get_submodule(root)
    pruner = graph.get_pruner_of_module(module)
    idxs = list(range(pruner.get_out_channels(module))) if idxs is None else idxs
    return graph.get_pruning_group(module, pruner.prune_out_channels, idxs)


def removed_squared_norm(
    model: Model, x: Tensor, root: str, idxs: list[int], scores: dict[str, Tensor]
) -> float:
    """Sums over the weights that Torch-Pruning removes from a copy, known by a number in each."""
    other = copy.deepcopy(model)
    first = 1
    for p in other.parameters():
        p.data = torch.arange(first, first + p.numel()).reshape(p.shape).float()
        first += p.numel()
    numbers = {name: p.data.clone() for name, p in other.named_parameters()}
    alike = {name: id(p) for name, p in other.named_parameters(remove_duplicate=False)}
    group_of(other, x, root, idxs).prune()
    total = 0.0
    for name, before in numbers.items():
        left = torch.ones_like(before, dtype=torch.bool)
        for alias, p in other.named_parameters(remove_duplicate=False):
            if alike[alias] == alike[name]:  # a tied one is two parameters by now
                left &= torch.isin(before, p.detach())
        if name.removesuffix(".weight") in scores:
            gone = scores[name.removesuffix(".weight")][~left]
            total += float(gone.double().square().sum())
    return total
