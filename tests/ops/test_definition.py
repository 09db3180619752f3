# SPDX-License-Identifier: MIT
"""score == the change of the three-layer product when one weight is zeroed, by brute force.

The layers are multiplied out as dense float64 matrices (tests/helpers/layer_oracle.py). For a
convolution the weight is one entry of its unrolled matrix, away from the border. Beside a flatten,
with pointwise or no layers around, the shared weight itself is zeroed everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import lap_ext
from tests.helpers import layer_oracle as oracle
from tests.helpers.layer_oracle import Layer, Skip
from tests.helpers.parameters import TOLERANCE


class Chain(NamedTuple):
    """Producers, middle layer, consumers; the grids (convolutions) that they meet on."""

    name: str
    before: list[Any]
    w: Layer
    after: list[Any]
    grid_in: tuple[int, ...] = ()
    grid_out: tuple[int, ...] = ()
    everywhere: bool = False


def weight(*shape: int) -> torch.Tensor:
    """Random without zeros: a whole filter is told by its count of nonzeros."""
    x = torch.randn(shape, dtype=torch.float64).float()
    return torch.where(x.abs() < 0.05, torch.full_like(x, 0.3), x)


def conv(*shape: int, **kwargs: Any) -> Layer:
    """A layer with random weights of this shape; `bn` adds a scale per shared channel."""
    channels = kwargs.pop("bn", None)
    scale = None if channels is None else weight(channels)
    return Layer(weight(*shape), scale=scale, **kwargs)


def linear_chains() -> list[Chain]:
    """Matrices: no grid, and every weight is an entry."""
    return [
        Chain("linear", [conv(4, 3)], conv(5, 4), [conv(2, 5)]),
        Chain("first", [], conv(5, 4), [conv(2, 5)]),
        Chain("last", [conv(4, 3)], conv(5, 4), []),
        Chain("alone", [], conv(3, 2), []),
        Chain("one_unit", [conv(1, 1)], conv(1, 1), [conv(1, 1)]),
        Chain("bn", [conv(4, 3, bn=4)], conv(5, 4), [conv(2, 5, bn=5)]),
        Chain("several", [conv(4, 3), conv(4, 6, bn=4)], conv(5, 4), [conv(2, 5), conv(7, 5)]),
        Chain("skips", [conv(4, 3, bn=4), Skip()], conv(4, 4), [Skip(), conv(2, 4), conv(3, 4)]),
    ]


def conv_chains() -> list[Chain]:
    """Unrolled convolutions, stride 1 without padding, on grids with an interior."""
    return [
        Chain("conv1d", [conv(3, 2, 3)], conv(4, 3, 2), [conv(2, 4, 3)], (6,), (5,)),
        Chain("conv2d", [conv(3, 2, 2, 2)], conv(2, 3, 2, 3), [conv(2, 2, 2, 2)], (5, 6), (4, 4)),
        Chain(
            "conv3d",
            [conv(2, 1, 2, 1, 2)],
            conv(2, 2, 1, 2, 1),
            [conv(1, 2, 2, 2, 1)],
            (3, 4, 2),
            (3, 3, 2),
        ),
        Chain(
            "grouped",
            [conv(4, 1, 3, groups=2)],
            conv(6, 2, 2, groups=2),
            [conv(6, 2, 2, groups=3)],
            (5,),
            (4,),
        ),
        Chain(
            "depthwise",
            [conv(4, 3, 1, 1)],
            conv(8, 1, 2, 2, groups=4),
            [conv(8, 1, 2, 2, groups=8)],
            (4, 4),
            (3, 3),
        ),
        Chain(
            "transposed",
            [conv(3, 2, 2)],
            conv(3, 4, 2, transposed=True),
            [conv(2, 4, 3)],
            (5,),
            (6,),
        ),
        Chain(
            "transposed_grouped",
            [conv(4, 3, 2)],
            conv(4, 3, 2, groups=2, transposed=True),
            [conv(6, 1, 2, groups=6)],
            (4,),
            (5,),
        ),
        Chain(
            "beside_transposed",
            [conv(6, 2, 2, groups=2, transposed=True)],
            conv(4, 4, 2),
            [conv(4, 3, 2, groups=2, transposed=True)],
            (6,),
            (5,),
        ),
        Chain(
            "residual",
            [conv(3, 2, 2, 2, bn=3), Skip()],
            conv(4, 3, 2, 1),
            [conv(2, 4, 2, 2), Skip(), conv(4, 2, 2, 2, groups=2, bn=4)],
            (5, 4),
            (4, 4),
        ),
    ]


def flatten_chains() -> list[Chain]:
    """Conv -> flatten -> linear and linear -> unflatten -> conv, with w on either side."""
    return [
        Chain("flatten_w", [conv(3, 2, 2, bn=3)], conv(2, 12), [conv(3, 2)], (4,)),
        Chain("flatten2d_w", [conv(3, 2, 1, 2)], conv(2, 18), [], (2, 3)),
        Chain("deconv_flatten_w", [conv(4, 1, 1, groups=2, transposed=True)], conv(2, 6), [], (3,)),
        Chain(
            "w_flatten",
            [conv(3, 2, 1, bn=3)],
            conv(2, 3, 2),
            [conv(4, 8, bn=2)],
            (5,),
            (4,),
            everywhere=True,
        ),
        Chain("first_w_flatten", [], conv(2, 1, 3), [conv(4, 6)], (5,), (3,), everywhere=True),
        Chain(
            "unflatten_w",
            [conv(12, 2)],
            conv(2, 3, 1),
            [conv(3, 2, 1)],
            (4,),
            (4,),
            everywhere=True,
        ),
        Chain(
            "unflatten_deconv",
            [conv(12, 2, bn=3)],
            conv(3, 2, 1, transposed=True),
            [],
            (4,),
            (4,),
            everywhere=True,
        ),
        Chain("w_unflatten", [conv(3, 2)], conv(12, 3), [conv(2, 3, 2, bn=3)], (), (4,)),
        Chain("w_unflatten_deconv", [], conv(12, 3), [conv(3, 2, 2, transposed=True)], (), (4,)),
    ]


def neighbors(layers: list[Any]) -> Any:
    """The same layers as lap_ext takes them."""
    converted = [
        lap_ext.IDENTITY
        if isinstance(x, Skip)
        else lap_ext.Neighbor(x.weight, groups=x.groups, transposed=x.transposed, scale=x.scale)
        for x in layers
    ]
    return converted if len(converted) != 1 else converted[0]


def brute_force(chain: Chain) -> torch.Tensor:
    """The distortions of all weights of the middle layer, nan where the grid has no interior."""
    middle = oracle.unroll(chain.w, chain.grid_in)
    before = oracle.producers(chain.before, middle.shape[1], chain.grid_in)
    after = oracle.consumers(chain.after, middle.shape[0], chain.grid_out)
    positions = [torch.Size(grid).numel() for grid in (chain.grid_in, chain.grid_out)]
    shared = (middle.shape[1] // positions[0], middle.shape[0] // positions[1])
    return oracle.distortions(before, chain.w, chain.grid_in, after, shared, chain.everywhere)


@pytest.mark.parametrize("family", [linear_chains, conv_chains, flatten_chains])
def test_score_is_the_distortion(family: Any) -> None:
    chains = family()
    for chain in chains:
        expected = brute_force(chain)
        got = lap_ext.score(
            neighbors(chain.before) or None,
            chain.w.weight,
            neighbors(chain.after) or None,
            groups=chain.w.groups,
            transposed=chain.w.transposed,
        ).double()
        seen = ~expected.isnan()
        assert seen.any(), chain.name
        assert chain.name.startswith("w_unflatten") or seen.all(), chain.name
        # The brute force subtracts two products: some 1e-15 of their size is noise.
        error = ((got - expected).abs() / expected)[seen].max()
        assert error <= TOLERANCE[torch.float32], f"{chain.name}: relative error {error:.3g}"
