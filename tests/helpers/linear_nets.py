# SPDX-License-Identifier: MIT
"""Models that are linear between their layers, with one position of every window.

The operator of a layer is its weight: the definition of exact worths can run them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from tests.helpers import network_oracle
from tests.helpers.networks import Case, Net, bn, conv, linear


def attention(m: Net, x: Tensor) -> Tensor:
    """One head, of [1, positions, 4]."""
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)))


class Twice(nn.Module):
    """One layer used at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.b(torch.relu(self.a(x))))))


class Packed(nn.Module):
    """Two projections in one weight, as slices of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.packed, self.b = linear(3), nn.Parameter(torch.ones(6, 3)), linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        up, gate = F.linear(y, self.packed[:3]), F.linear(y, self.packed[3:])
        return self.b(up * gate)


# fmt: off
# Of a 1x1 image or of a row: every model has an operator that is a matrix.
CASES = {
    "chain": Case(lambda: nn.Sequential(linear(5), nn.ReLU(), linear(6, 5), linear(3, 6)), (1, 4)),
    "residual": Case(
        lambda: Net(
            lambda m, x: m.d((y := m.a(x)) + m.c(torch.relu(m.b(y)))),
            a=linear(),
            b=linear(5),
            c=linear(4, 5),
            d=linear(3),
        ),
        (1, 4),
    ),
    "residual from the input": Case(
        lambda: Net(lambda m, x: m.b(x + m.a(x)) + x, a=linear(), b=linear()), (1, 4)
    ),
    "concatenated": Case(
        lambda: Net(
            lambda m, x: m.d(torch.cat([m.c(y := torch.relu(m.a(x))), m.b(x), y], 1)),
            a=linear(3),
            b=linear(2),
            c=linear(4, 3),
            d=linear(3, 9),
        ),
        (1, 4),
    ),
    "batch norms": Case(
        lambda: Net(
            lambda m, x: m.c(torch.relu(m.nb(m.b(torch.relu(m.na(m.a(x))))))),
            a=conv(6), na=bn(6), b=conv(4, 6), nb=bn(4), c=conv(3),
        ),
        (1, 4, 1, 1),
    ),
    "batch norms at the ends": Case(
        lambda: Net(
            lambda m, x: m.o(m.b(m.a(m.n(x)))), n=bn(4), a=conv(5), b=conv(3, 5), o=bn(3),
        ),
        (1, 4, 1, 1),
    ),
    "batch norm before a part": Case(
        lambda: Net(
            lambda m, x: m.b(torch.cat([m.n((y := m.a(x))[:, :2]), y[:, 2:]], 1)),
            a=conv(5), n=bn(2), b=conv(3, 5),
        ),
        (1, 4, 1, 1),
    ),
    "grouped": Case(
        lambda: Net(
            lambda m, x: m.d(m.c(m.n(m.b(m.a(x))))),
            a=conv(8), b=conv(6, 8, groups=2), n=bn(6), c=conv(9, 6, groups=3), d=conv(2, 9),
        ),
        (1, 4, 1, 1),
    ),
    "depthwise": Case(
        lambda: Net(
            lambda m, x: m.c(m.n(m.b(m.a(x)))),
            a=conv(6), b=conv(6, 6, groups=6), n=bn(6), c=conv(2, 6),
        ),
        (1, 4, 1, 1),
    ),
    "transposed": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x))),
            a=conv(6), b=nn.ConvTranspose2d(6, 4, 1, groups=2), c=conv(3),
        ),
        (1, 4, 1, 1),
    ),
    "flattened": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(3), b=linear(5, 12)),
        (1, 4, 2, 2),
        {"positions": "all"},
    ),
    "flattened with channels last": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).movedim(1, -1).flatten(1)), a=conv(3), b=linear(5, 12)),
        (1, 4, 2, 2),
        {"positions": "all"},
    ),
    "gated": Case(
        lambda: Net(
            lambda m, x: m.down(F.silu(m.gate(y := m.a(x))) * m.up(y)),
            a=linear(), gate=linear(6), up=linear(6), down=linear(3, 6),
        ),
        (1, 4),
    ),
    "attention": Case(
        lambda: Net(
            lambda m, x: attention(m, m.a(x)), a=linear(), q=linear(3), k=linear(3), v=linear(5),
            o=linear(2, 5),
        ),
        (1, 1, 4),
    ),
    "packed": Case(Packed, (1, 4)),
    "with and without groups": Case(
        lambda: Net(
            lambda m, x: m.b(F.conv2d(m.a(x), m.w)) + m.d(F.conv2d(m.c(x), m.w, groups=3)),
            w=nn.Parameter(torch.ones(6, 2, 1, 1)),
            a=conv(2), b=conv(3, 6), c=conv(6), d=conv(3, 6),
        ),
        (1, 4, 1, 1),
    ),
    "twice": Case(Twice, (1, 4)),
}
# fmt: on


def runs(model: nn.Module, case: Case) -> list[network_oracle.Run]:
    x, how = torch.randn(case.shape, dtype=torch.float64), case.how
    options = (how.get("positions", "one"), "last", lambda y: y)
    found = [network_oracle.cut(model, (x,), *options)]
    if found[0].products:
        found.append(network_oracle.cut(model, (x,), *options, sign=-1.0))
    return found
