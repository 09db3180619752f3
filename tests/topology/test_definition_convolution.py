# SPDX-License-Identifier: MIT
"""lap_ext.scores == the brute-force definition, weight by weight: convolutional models.

Images are one pixel wide, as all kernels are, so that every weight is one entry of its operator; of
2 x 2 pixels where a flatten turns them into channels. Max and average pooling stand over one pixel,
where they are the identity. Larger kernels: test_definition_windows.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lap_ext
from tests.helpers.network_oracle import distortions
from tests.helpers.networks import RTOL, Case, Net, bn, check, conv, randomized


# ---- residual and dense blocks ----------------------------------------------------------------
def basic_blocks(m: Any, x: Tensor) -> Tensor:
    """ResNet: a block with a projection, norms on both of its branches, and one with a skip."""
    x = F.relu(m.n0(m.stem(x)))
    branch = m.n2(m.b(F.relu(m.n1(m.a(x)))))
    x = F.relu(branch + m.n3(m.project(x)))
    x = F.relu(x + m.n5(m.d(F.relu(m.n4(m.c(x))))))
    return m.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def wide_blocks(m: Any, x: Tensor) -> Tensor:
    """WRN: the norm comes first. The projection reads the normed stream, the skip the plain one."""
    x = m.stem(x)
    h = F.relu(m.n1(x))
    x = m.project(h) + m.b(F.relu(m.n2(m.a(h))))
    x = x + m.d(F.relu(m.n4(m.c(F.relu(m.n3(x))))))
    return m.head(F.avg_pool2d(F.relu(m.n5(x)), 1).mean((2, 3)))


def dense_block(m: Any, x: Tensor) -> Tensor:
    """DenseNet: every layer reads all before it through a norm of its own."""
    x = m.stem(x)
    y = m.a(F.relu(m.n1(x)))
    z = m.b(F.relu(m.n2(torch.cat([x, y], 1))))
    return m.c(F.relu(m.n3(torch.cat([x, y, z], 1))))


def inception(m: Any, x: Tensor) -> Tensor:
    """GoogLeNet: four branches side by side, one of them after a pooling."""
    x = m.stem(x)
    pooled = m.d(F.max_pool2d(x, 3, stride=1, padding=1))
    return m.e(F.relu(torch.cat([m.a(x), m.b2(F.relu(m.b1(x))), pooled], 1)))


def shuffled(m: Any, x: Tensor) -> Tensor:
    """ShuffleNet: grouped layers that exchange their channels, halves of the stream in turn."""
    x = m.stem(x)
    y = m.a(x).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
    kept, changed = F.relu(m.n(m.b(y))).chunk(2, dim=1)
    y = torch.cat([kept, m.c(changed)], 1)
    n, c, h, w = y.shape
    y = y.view(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
    return m.d(y)


def squeezed(m: Any, x: Tensor) -> Tensor:
    """MobileNetV3: expand, depthwise, a gate from the pooled channels, project, skip."""
    x = m.stem(x)
    y = F.hardswish(m.n1(m.expand(x)))
    y = F.hardswish(m.n2(m.depth(y)))
    gate = m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1))))
    return m.head(x + m.n3(m.project(y * F.hardsigmoid(gate))))


def convnext(m: Any, x: Tensor) -> Tensor:
    """ConvNeXt: depthwise, then linear layers over the last dimension, a layer scale, a skip."""
    x = m.stem(x)
    y = m.n(m.depth(x).permute(0, 2, 3, 1))
    y = m.gamma * m.b(F.gelu(m.a(y)))
    return m.head(x + y.permute(0, 3, 1, 2))


def u_net(m: Any, x: Tensor) -> Tensor:
    """Down, up by a transposed convolution, beside the skip; up again by interpolation."""
    top = F.relu(m.n(m.a(x)))
    low = F.relu(m.b(F.max_pool2d(top, 1)))
    up = torch.cat([m.up(torch.cat([low, m.c(low)], 1)), top], 1)
    return m.e(F.interpolate(m.d(up), scale_factor=2, mode="nearest"))


BLOCKS = {
    "basic": Case(
        lambda: Net(
            basic_blocks,
            stem=conv(3, 2),
            a=conv(4, 3),
            b=conv(),
            project=conv(4, 3),
            c=conv(5, 4),
            d=conv(4, 5),
            head=nn.Linear(4, 2),
            n4=bn(5),
            n0=bn(3),
            n1=bn(),
            n2=bn(),
            n3=bn(),
            n5=bn(),
        ),
        (1, 2, 1, 1),
    ),
    "wide": Case(
        lambda: Net(
            wide_blocks,
            stem=conv(3, 2),
            a=conv(4, 3),
            b=conv(),
            project=conv(4, 3),
            c=conv(5, 4),
            d=conv(4, 5),
            head=nn.Linear(4, 2),
            n4=bn(5),
            n1=bn(3),
            n2=bn(),
            n3=bn(),
            n5=bn(),
        ),
        (1, 2, 1, 1),
    ),
    "dense": Case(
        lambda: Net(
            dense_block,
            stem=conv(3, 2),
            a=conv(2, 3),
            b=conv(2, 5),
            c=conv(2, 7),
            n1=bn(3),
            n2=bn(5),
            n3=bn(7),
        ),
        (1, 2, 1, 1),
    ),
    "inception": Case(
        lambda: Net(
            inception,
            stem=conv(3, 2),
            a=conv(2, 3),
            b1=conv(2, 3),
            b2=conv(3, 2),
            d=conv(1, 3),
            e=conv(2, 6),
        ),
        (1, 2, 1, 1),
    ),
    "shuffled": Case(
        lambda: Net(
            shuffled,
            stem=conv(4, 2),
            a=conv(6, 4, groups=2),
            b=conv(6, 6, groups=3),
            n=bn(6),
            c=conv(3, 3),
            d=conv(2, 6),
        ),
        (1, 2, 1, 1),
    ),
    "squeezed": Case(
        lambda: Net(
            squeezed,
            stem=conv(3, 2),
            expand=conv(6, 3),
            depth=conv(6, 6, groups=6),
            down=conv(2, 6),
            up=conv(6, 2),
            project=conv(3, 6),
            head=conv(2, 3),
            n1=bn(6),
            n2=bn(6),
            n3=bn(3),
        ),
        (1, 2, 1, 1),
    ),
    "convnext": Case(
        lambda: Net(
            convnext,
            stem=conv(4, 2),
            depth=conv(groups=4),
            n=nn.LayerNorm(4),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 4),
            head=conv(2, 4),
            gamma=nn.Parameter(torch.ones(4)),
        ),
        (1, 2, 1, 1),
    ),
    "u_net": Case(
        lambda: Net(
            u_net,
            a=conv(3, 2),
            b=conv(4, 3),
            c=conv(),
            up=nn.ConvTranspose2d(8, 3, 1),
            d=conv(4, 6),
            e=conv(2, 4),
            n=bn(3),
        ),
        (1, 2, 1, 1),
        {"read": lambda y: y[..., 0, 0]},
    ),
}


# ---- positions that become channels, and back -------------------------------------------------
def flattened(m: Any, x: Tensor) -> Tensor:
    return m.d(F.relu(m.c(F.relu(m.b(F.relu(m.n(m.a(x))))).flatten(1))))


def flattened_last(m: Any, x: Tensor) -> Tensor:
    return m.d(F.relu(m.c(F.relu(m.b(F.relu(m.n(m.a(x))))).permute(0, 2, 3, 1).flatten(1))))


def flattened_both(m: Any, x: Tensor) -> Tensor:
    """The same convolutions read by a linear layer in either order, and by a convolution."""
    y = m.b(F.relu(m.n(m.a(x))))
    z = y.permute(0, 2, 3, 1).reshape(1, 8)
    return m.c(y.view(y.shape[0], -1)) + m.d(z) + m.e(y)[..., 0, 0]


def flattened_norm(m: Any, x: Tensor) -> Tensor:
    """The norm after the flatten has a scale for every position of a channel."""
    return m.c(F.relu(m.n8(m.b(m.n(m.a(x))).flatten(1))))


def merged_patches(m: Any, x: Tensor) -> Tensor:
    """Swin: four positions become four times the channels, channels last."""
    y = m.b(m.n(m.a(x))).permute(0, 2, 3, 1)
    parts = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return m.c(m.norm(torch.cat(parts, dim=-1)))


def unshuffled(m: Any, x: Tensor) -> Tensor:
    return m.e(F.pixel_unshuffle(m.b(m.n(m.a(x))), 2))


def unflattened(m: Any, x: Tensor) -> Tensor:
    return m.c(F.relu(m.n(m.b(m.a(x).view(-1, 3, 2, 2)))))


def pixel_shuffled(m: Any, x: Tensor) -> Tensor:
    return m.c(F.pixel_shuffle(F.relu(m.b(m.a(x))), 2))


def flat_layers() -> dict[str, nn.Module]:
    return {"a": conv(3, 2), "n": bn(3), "b": conv(2, 3), "c": nn.Linear(8, 3)}


POSITIONS = {
    "flatten": Case(
        lambda: Net(flattened, d=nn.Linear(3, 2), **flat_layers()),
        (1, 2, 2, 2),
    ),
    "flatten_last": Case(
        lambda: Net(flattened_last, d=nn.Linear(3, 2), **flat_layers()),
        (1, 2, 2, 2),
    ),
    "flatten_both": Case(
        lambda: Net(flattened_both, d=nn.Linear(8, 3), e=conv(3, 2), **flat_layers()),
        (1, 2, 2, 2),
    ),
    "flatten_norm": Case(
        lambda: Net(flattened_norm, n8=nn.BatchNorm1d(8), **flat_layers()), (1, 2, 2, 2)
    ),
    "merged_patches": Case(
        lambda: Net(merged_patches, norm=nn.LayerNorm(8), **flat_layers()), (1, 2, 2, 2)
    ),
    "unshuffled": Case(
        lambda: Net(unshuffled, a=conv(3, 2), n=bn(3), b=conv(2, 3), e=conv(3, 8)), (1, 2, 2, 2)
    ),
    "flatten_from_input": Case(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)),
        (1, 2, 2, 2),
    ),
    "unflatten": Case(
        lambda: Net(unflattened, a=nn.Linear(2, 12), b=conv(2, 3), n=bn(2), c=nn.Flatten()),
        (1, 2),
        {"positions": "all"},
    ),
    "pixel_shuffle": Case(
        lambda: Net(pixel_shuffled, a=conv(3, 2), b=conv(8, 3), c=conv(2, 2)),
        (1, 2, 1, 1),
        {"positions": "all"},
    ),
}

CASES = BLOCKS | POSITIONS


@pytest.mark.parametrize("name", list(CASES))
def test_conv(name: str) -> None:
    case = CASES[name]
    check(case.build(), torch.randn(case.shape, dtype=torch.float64), **case.how)


def without_norms(model: nn.Module, folded: bool) -> nn.Module:
    """The basic blocks without batch norms, which are dropped or multiplied into the weights."""
    model = copy.deepcopy(model)
    pairs = {"stem": "n0", "a": "n1", "b": "n2", "project": "n3", "c": "n4", "d": "n5"}
    for layer, norm in pairs.items():
        if folded:
            fused = fuse_conv_bn_eval(getattr(model, layer), getattr(model, norm))
            setattr(model, layer, fused)
        setattr(model, norm, nn.Identity())
    return model


@pytest.mark.parametrize("how", ["ignore", "fold"])
def test_batch_norms_otherwise(how: str) -> None:
    """Ignored: as if there were none. Folded: as part of the weights of all three layers."""
    model = randomized(CASES["basic"].build())
    x = torch.randn(CASES["basic"].shape, dtype=torch.float64)
    expected = distortions(without_norms(model, how == "fold"), x)
    got = lap_ext.scores(model, x, batch_norm=how)
    assert set(got) == set(expected)
    for name, score in got.items():
        torch.testing.assert_close(score, expected[name], rtol=RTOL, atol=0)
