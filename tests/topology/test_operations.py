# SPDX-License-Identifier: MIT
"""Every operation between two layers, against where it really moves each channel.

The oracle runs the operation itself: on a tensor that is 1 in one channel, at all positions, and 0
in the others. Where the result differs from that of zeros, the channel has landed; the largest
difference is its factor. Nothing here knows how lap_ext follows channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.topologies import V, W, Weighted, followed

Operation = Callable[[Tensor], Tensor]
SHAPES = {"rows": (6,), "tokens": (5, 6), "signal": (6, 8), "image": (4, 3, 5), "square": (4, 4, 4)}


class Between(nn.Module):
    """A layer, an operation, a layer. Rows and tokens have their channels last, images first."""

    def __init__(self, operation: Operation, kind: str, reader: str) -> None:
        super().__init__()
        size = SHAPES[kind]
        self.last = kind in ("rows", "tokens")
        self.operation = operation
        convs: Any = {2: nn.Conv1d, 3: nn.Conv2d}
        self.made = (2, *size)
        self.given = (2, *size[:-1], 3) if self.last else (2, 3, *size[1:])
        self.a = nn.Linear(3, size[-1]) if self.last else convs[len(size)](3, size[0], 1)
        result = operation(torch.zeros(self.made)).shape
        self.dim = len(result) - 1 if reader == "linear" else len(result) - int(reader[-1]) - 1
        n = result[self.dim]
        self.b = nn.Linear(n, 2) if reader == "linear" else convs[int(reader[-1]) + 1](n, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self.a(x)))

    @torch.no_grad()
    def landed(self) -> dict[tuple[int, int], float]:
        """(Input of b, channel of a) -> factor, by running the operation."""
        dim = len(self.made) - 1 if self.last else 1
        nothing = self.operation(torch.zeros(self.made))
        result = {}
        for channel in range(self.made[dim]):
            x = torch.zeros(self.made)
            x.select(dim, channel).fill_(1)
            change = (self.operation(x) - nothing).abs().movedim(self.dim, 0).flatten(1).amax(1)
            result |= {(i, channel): float(y) for i, y in enumerate(change) if y > 0}
        return result


def agree(operation: Operation, kind: str, reader: str, scaled: bool = True) -> None:
    torch.manual_seed(0)
    model = Between(operation, kind, reader).eval()
    topology = lap_ext.trace(model, torch.randn(model.given))
    expected, got = model.landed(), followed(topology)
    assert got.keys() == expected.keys()
    if scaled:
        assert got == pytest.approx(expected, rel=1e-5)


def padded_image(x: Tensor) -> Tensor:
    return F.pad(x, (1, 2, 0, 1))


def written(x: Tensor, at: Any, value: Any = 0.0) -> Tensor:
    y = x.clone()
    y[at] = value(x) if callable(value) else value
    return y


def into_zeros(x: Tensor, width: int, *writes: tuple[Any, Any]) -> Tensor:
    y = x.new_zeros(x.shape[0], width)
    for at, source in writes:
        y[:, at] = x[:, source]
    return y


def im2col(x: Tensor) -> Tensor:
    return F.unfold(x, (2, 3), padding=1).transpose(1, 2)


ONE = torch.ones(2, 1, 3, 5)
CLS = torch.ones(2, 1, 6)
MIXED = torch.tensor([3, 1, 1, 0])
KEPT = torch.tensor([True, False, False, True, True, False])
PLACES = torch.tensor([2, 0, 5]).expand(2, 3)
GRID = torch.rand(2, 4, 4, 2) - 0.5

BLUR = torch.tensor([[0.1, 0.2, 0.1], [0.2, 0.3, 0.1]])[None, None]
KERNEL = torch.rand(6, 4, 2, 2) + 0.1
THREE = torch.rand(3, 6) + 0.1


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(-2)


# name: (operation, what a makes, how b reads)
MOVES: dict[str, tuple[Operation, str, str]] = {
    # shapes
    "flatten": (lambda x: x.flatten(1), "image", "linear"),
    "view": (lambda x: x.view(2, -1), "image", "linear"),
    "channels_last": (lambda x: x.permute(0, 2, 3, 1), "image", "linear"),
    "flatten_last": (lambda x: x.permute(0, 2, 3, 1).reshape(2, -1), "image", "linear"),
    "flatten_rows": (lambda x: x.permute(0, 2, 1, 3).flatten(2), "image", "linear"),
    "tokens_of_image": (lambda x: x.flatten(2).transpose(1, 2), "image", "linear"),
    "image_of_tokens": (lambda x: x.transpose(1, 2).unflatten(2, (5, 1)), "tokens", "conv2"),
    "all_tokens": (lambda x: x.reshape(2, 30), "tokens", "linear"),
    "pairs_of_tokens": (lambda x: x[:, :4].reshape(2, 2, 12), "tokens", "linear"),
    "halves_of_tokens": (lambda x: x.reshape(2, 10, 3), "tokens", "linear"),
    "heads": (lambda x: x.view(2, 5, 3, 2).transpose(1, 2), "tokens", "linear"),
    "heads_and_back": (lambda x: x.view(2, 5, 3, 2).permute(0, 3, 1, 2).flatten(1), "tokens",
                       "linear"),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), "rows", "linear"),
    "unflatten_first": (lambda x: x.unflatten(1, (2, 3)), "rows", "conv1"),
    "unsqueeze": (lambda x: x.unsqueeze(1), "rows", "linear"),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), "rows", "linear"),
    "expand": (lambda x: x[:, None].expand(2, 3, 6), "rows", "linear"),
    "t": (lambda x: x.t().t(), "rows", "linear"),
    "einsum": (lambda x: torch.einsum("nij->nji", x.unflatten(1, (2, 3))).flatten(1), "rows",
               "linear"),
    "einsum_any": (lambda x: torch.einsum("...i->i...", x).T, "rows", "linear"),
    "mT": (lambda x: x.mT, "tokens", "conv1"),
    "swapaxes": (lambda x: x.swapaxes(1, 3), "image", "linear"),
    "movedim": (lambda x: x.movedim(1, -1), "image", "linear"),
    "view_as": (lambda x: x.view_as(torch.zeros(2, 2, 3)), "rows", "linear"),
    # orders
    "flip": (lambda x: x.flip(-1), "rows", "linear"),
    "flip_image": (lambda x: x.flip(2, 3), "image", "conv2"),
    "roll": (lambda x: x.roll(2, dims=1), "image", "conv2"),
    "roll_all": (lambda x: x.roll(1), "rows", "linear"),
    "roll_image": (lambda x: x.roll((1, 2), dims=(2, 3)), "image", "conv2"),
    "rot90": (lambda x: x.rot90(1, (2, 3)), "image", "conv2"),
    "rot90_channels": (lambda x: x.rot90(1, (1, 2)), "square", "conv2"),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), "image", "conv2"),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), "image", "conv2"),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), "square", "conv2"),
    "index": (lambda x: x[:, [2, 0, 3, 3]], "image", "conv2"),
    "index_from_the_end": (lambda x: x[:, [-1, 0, -2]], "image", "conv2"),
    "index_of_positions": (lambda x: x[:, :, [2, 0, 0]], "image", "conv2"),
    "index_twice": (lambda x: x.unflatten(1, (2, 3))[:, [0, 1, 1], [2, 0, 1]], "rows", "linear"),
    "index_select": (lambda x: x.index_select(1, MIXED), "image", "conv2"),
    "gather_positions": (lambda x: x.gather(1, torch.zeros(2, 2, 6).long()), "tokens", "linear"),
    "gather_first": (lambda x: x.gather(1, torch.zeros(2, 2, 4).long()), "tokens", "linear"),
    "take_along_dim": (lambda x: x.take_along_dim(torch.zeros(2, 1, 1).long(), 1), "tokens",
                       "linear"),
    # parts
    "slice": (lambda x: x[:, 1:3], "image", "conv2"),
    "steps": (lambda x: x[:, ::2, ::2], "image", "conv2"),
    "narrow": (lambda x: x.narrow(1, 2, 2), "image", "conv2"),
    "select": (lambda x: x.select(1, 3).unsqueeze(1), "image", "conv2"),
    "a_token": (lambda x: x[:, 0], "tokens", "linear"),
    "split": (lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), "image", "conv2"),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "image", "conv2"),
    "tensor_split": (lambda x: torch.cat(x.tensor_split((1, 2), 1)[::-1], 1), "image", "conv2"),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1], 1), "image", "conv2"),
    "one_of_split": (lambda x: x.split(2, 1)[1], "image", "conv2"),
    "diagonal": (lambda x: x.unflatten(1, (2, 3)).diagonal(dim1=1, dim2=2), "rows", "linear"),
    "unfold": (lambda x: x.unfold(1, 2, 2), "tokens", "conv2"),
    "unfold_channels": (lambda x: x.unfold(1, 4, 1), "rows", "linear"),
    "im2col": (im2col, "image", "linear"),
    "fold_apart": (lambda x: F.fold(x[:, :, :4], (2, 4), (1, 2), stride=(1, 2)), "signal", "conv2"),
    "select_by_mask": (lambda x: x[x[:, :, 0] > -9], "tokens", "linear"),
    "select_images_by_mask": (lambda x: x[x[:, 0, 0, 0] > -9], "image", "conv2"),
    "vmap": (torch.vmap(lambda x: x.flip(0)), "rows", "linear"),
    "complex_and_back": (lambda x: real(pairs(x).flip(1)), "rows", "linear"),
    "real_part": (lambda x: pairs(x).conj().real, "rows", "linear"),
    "imaginary_part": (lambda x: torch.complex(x[:, :2], x[:, 3:5]).imag, "rows", "linear"),
    # copies
    "repeat": (lambda x: x.repeat(1, 3, 1, 2), "image", "conv2"),
    "tile": (lambda x: x.tile(2), "rows", "linear"),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), "image", "conv2"),
    "repeat_positions": (lambda x: x.repeat_interleave(3, 2), "image", "conv2"),
    "repeat_heads": (
        lambda x: x.view(2, 3, 1, 2).expand(2, 3, 4, 2).reshape(2, 24), "rows", "linear"),
    # beside constants and each other
    "cat_ones": (lambda x: torch.cat([ONE, x, ONE], 1), "image", "conv2"),
    "one_beside_ones": (lambda x: torch.cat([CLS[:, 0, :1], x[:, 2:3]], 1), "rows", "linear"),
    "cat_itself": (lambda x: torch.cat([x, x[:, :1]], 1), "image", "conv2"),
    "class_token": (lambda x: torch.cat([CLS, x], 1), "tokens", "linear"),
    "class_token_alone": (lambda x: torch.cat([CLS, x], 1)[:, 1:], "tokens", "linear"),
    "cat_empty": (lambda x: torch.cat([torch.zeros(0), x], 1), "rows", "linear"),
    "stack": (lambda x: torch.stack([x, x.flip(1)], 1).flatten(1), "rows", "linear"),
    "stack_ones": (lambda x: torch.stack([x, torch.ones(2, 6)], 2).flatten(1), "rows", "linear"),
    "hstack": (lambda x: torch.hstack([x, torch.ones(2, 1), x]), "rows", "linear"),
    "vstack": (lambda x: torch.vstack([x, x]), "rows", "linear"),
    "pad": (padded_image, "image", "conv2"),
    "pad_one_channel": (lambda x: F.pad(x[:, 2:3], (1, 2)), "rows", "linear"),
    "crop": (lambda x: F.pad(x, (-1, -1)), "image", "conv2"),
    "pad_channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), "image", "conv2"),
    "pad_channels_ones": (lambda x: F.pad(x, (1, 2), value=1.0), "rows", "linear"),
    "crop_channels": (lambda x: F.pad(x, (-1, -2)), "rows", "linear"),
    "pad_reflect": (lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"), "image", "conv2"),
    "pad_replicate": (lambda x: F.pad(x, (1, 1, 2, 2), mode="replicate"), "image", "conv2"),
    "pad_circular": (lambda x: F.pad(x, (1, 1, 2, 2), mode="circular"), "image", "conv2"),
    "reflect_channels": (lambda x: F.pad(x[:, None], (2, 1), mode="reflect"), "rows", "linear"),
    "circular_channels": (lambda x: F.pad(x[:, None], (2, 1), mode="circular"), "rows", "linear"),
    # written in place
    "written_zero": (lambda x: written(x, (slice(None), 2)), "rows", "linear"),
    "written_slice": (
        lambda x: written(x, (slice(None), slice(0, 2)), lambda x: x[:, 3:5]), "rows", "linear"),
    "written_one": (lambda x: written(x, (slice(None), 4), lambda x: x[:, 1]), "rows", "linear"),
    "into_zeros": (lambda x: into_zeros(x, 4, (0, 5), (2, 1)), "rows", "linear"),
    "slices_into_zeros": (
        lambda x: into_zeros(x, 8, (slice(1, 2), slice(5, 6)), (slice(3, 6), slice(0, 3))),
        "rows", "linear"),
    "positions_into_zeros": (
        lambda x: written(torch.zeros(2, 7, 6), (slice(None), slice(2, 7)), x), "tokens", "linear"),
    "placed": (lambda x: written(torch.zeros(2, 8), (slice(None), [7, 0, 2]), x[:, [1, 1, 4]]),
               "rows", "linear"),
    "placed_ones": (lambda x: written(x, (slice(None), [1, 3]), 1.0), "rows", "linear"),
    "placed_zeros": (lambda x: written(x, (slice(None), torch.tensor([1, 3])), torch.zeros(2, 2)),
                     "rows", "linear"),
    "placed_by_mask": (lambda x: written(x, (slice(None), KEPT), 0.0), "rows", "linear"),
    "placed_in_heads": (lambda x: written(x.unflatten(1, (2, 3)), (slice(None), [0, 1], [2, 0]),
                                          0.0).flatten(1), "rows", "linear"),
    "scattered": (lambda x: torch.zeros(2, 6).scatter(1, PLACES, x[:, 3:]), "rows", "linear"),
    "scattered_number": (lambda x: x.scatter(1, PLACES, 0.0), "rows", "linear"),
    "index_copied": (lambda x: x.index_copy(1, PLACES[0], x[:, 3:]), "rows", "linear"),
    "index_filled": (lambda x: x.index_fill(1, PLACES[0], 0.0), "rows", "linear"),
    "copied": (lambda x: torch.ones_like(x).copy_(x.flip(1)), "rows", "linear"),
    # positions
    "max_pool": (lambda x: F.max_pool2d(x, 2), "image", "conv2"),
    "max_pool_indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], "image", "conv2"),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), "image", "conv2"),
    "avg_pool_1d": (lambda x: F.avg_pool1d(x, 2), "signal", "conv1"),
    "adaptive_avg_pool": (lambda x: F.adaptive_avg_pool2d(x, (1, 2)).flatten(1), "image", "linear"),
    "adaptive_max_pool": (lambda x: F.adaptive_max_pool1d(x, 3), "signal", "conv1"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), "image", "conv2"),
    "bilinear": (lambda x: F.interpolate(x, size=(4, 4), mode="bilinear"), "image", "conv2"),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "image", "conv2"),
    "linear": (lambda x: F.interpolate(x, size=5, mode="linear"), "signal", "conv1"),
    "area": (lambda x: F.interpolate(x, size=2, mode="area"), "signal", "conv1"),
    "antialiased": (
        lambda x: F.interpolate(x, size=(2, 2), mode="bilinear", antialias=True), "image", "conv2"),
    "grid_sample": (
        lambda x: F.grid_sample(x, GRID, align_corners=False, padding_mode="border"),
        "image", "conv2"),
    "mean_of_positions": (lambda x: x.mean((2, 3)), "image", "linear"),
    "mean_of_tokens": (lambda x: x.mean(1), "tokens", "linear"),
    "maximum_of_tokens": (lambda x: x.max(1).values, "tokens", "linear"),
    "amax_of_positions": (lambda x: x.amax((-2, -1), keepdim=True), "image", "conv2"),
    "sorted_positions": (lambda x: x.sort(dim=2).values, "image", "conv2"),
    "best_positions": (lambda x: x.topk(2, dim=-1).values, "signal", "conv1"),
    "blur": (lambda x: F.conv2d(x, BLUR.expand(4, 1, 2, 3), groups=4), "image", "conv2"),
    "blur_twice": (lambda x: F.conv2d(x, BLUR.repeat(8, 1, 1, 1), groups=4), "image", "conv2"),
    "enlarge": (lambda x: F.conv_transpose2d(x, torch.ones(4, 1, 2, 2), stride=2, groups=4),
                "image", "conv2"),
    # channels
    "fold": (lambda x: F.fold(x, (1, 9), (1, 2)), "signal", "conv2"),
    "kernel": (lambda x: F.conv2d(x, KERNEL), "image", "conv2"),
    "kernel_of_groups": (lambda x: F.conv2d(x, KERNEL[:, :2], groups=2), "image", "conv2"),
    "kernel_transposed": (lambda x: F.conv_transpose2d(x, KERNEL[:4, :2, :1, :1], groups=2),
                          "image", "conv2"),
    "linear_map": (lambda x: F.linear(x, KERNEL[:4, :, 0].flatten(1)[:, :6]), "rows", "linear"),
    "three_in_an_einsum": (lambda x: torch.einsum("nc,oc,o->no", x, THREE, W[3:]), "rows",
                           "linear"),
    "scaled_by_einsum": (lambda x: torch.einsum("n...,...->n...", x, W), "rows", "linear"),
    "mean": (lambda x: x.mean(1, keepdim=True), "image", "conv2"),
    "mean_of_all": (lambda x: x.mean((1, 2, 3))[:, None], "image", "linear"),
    "mean_of_flat": (lambda x: x.flatten(1).mean(1, keepdim=True), "image", "linear"),
    "mean_of_groups": (lambda x: x.view(2, 2, 3).mean(2), "rows", "linear"),
    "mean_of_some": (lambda x: x[:, [0, 0, 3]].mean(1, keepdim=True), "rows", "linear"),
    "mean_with_ones": (lambda x: torch.stack([x, torch.ones(2, 6)]).mean(0), "rows", "linear"),
    "sum": (lambda x: x.sum(-1, keepdim=True), "rows", "linear"),
    "sum_by_einsum": (lambda x: torch.einsum("nij->nj", x.unflatten(1, (2, 3))), "rows", "linear"),
    "sum_of_all_by_einsum": (lambda x: torch.einsum("i...->", x[:1]).view(1, 1), "rows", "linear"),
    "sum_of_groups": (lambda x: x.view(2, 2, 3).sum(1), "rows", "linear"),
    "maxout": (lambda x: x.view(2, 3, 2).amax(-1), "rows", "linear"),
    "largest": (lambda x: x.max(-1, keepdim=True).values, "rows", "linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MOVES))
def test_moves(name: str) -> None:
    agree(*MOVES[name])


def test_windows_and_back() -> None:
    """As in a sum of positions, a channel that is added several times stays itself."""
    model = Between(
        lambda x: F.fold(F.unfold(x, 2, padding=1), (3, 5), 2, padding=1), "image", "conv2"
    )
    assert followed(lap_ext.trace(model, torch.randn(model.given))) == {(i, i): 1 for i in range(4)}


def test_pairs_that_are_turned() -> None:
    """Both parts of a rotary embedding's result come from both parts, with cos^2 and sin^2."""
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    turns = torch.polar(torch.ones(5, 3), angles)
    for by in (turns, turns[1]):
        model = Between(lambda x, by=by: real(pairs(x) * by), "tokens", "linear")
        got = followed(lap_ext.trace(model, torch.randn(model.given)))
        both = {(i, j): 0.5**0.5 for i in range(6) for j in (i - i % 2, i - i % 2 + 1)}
        assert got == pytest.approx(both) and got.keys() == model.landed().keys()


def test_a_filter_counts_the_most_that_it_amplifies() -> None:
    """A wavelet's taps are 0 in sum."""
    haar = torch.tensor([0.5, -0.5]).expand(6, 1, 2)
    model = Between(lambda x: F.conv1d(x, haar, groups=6, stride=2), "signal", "conv1")
    assert followed(lap_ext.trace(model, torch.randn(model.given))) == {(i, i): 1 for i in range(6)}


SCALES: dict[str, Any] = {
    "number": lambda x: 2.5 * x,
    "divided": lambda x: x / 4,
    "zero": lambda x: x * 0.0,
    "minus": lambda x: 3 - x,
    "negative": lambda x: -x,
    "of_parts": lambda x: torch.cat([x[:, :3] * 2, x[:, 3:] / 2], 1),
    "numbers": lambda x: (2 * x + 1) * 3 / 5,
    "constant": lambda x: x * W,
    "constant_scalar": lambda x: x * torch.tensor(0.3),
    "constant_mask": lambda x: x * (W > 0),
    "parameter": Weighted(W, lambda x, w: x * w),
    "scalar_parameter": Weighted(torch.tensor([0.7]), lambda x, w: w * x),
    "by_parameter": Weighted(V, lambda x, w: x / w),
    "one_plus": Weighted(W, lambda x, w: x * (1 + w)),
    "exponential": Weighted(W, lambda x, w: x * w.exp()),
    "sliced": Weighted(torch.arange(8.0), lambda x, w: x * w[2:]),
    "repeated": Weighted(V[:3], lambda x, w: x * w.repeat(2)),
    "column": Weighted(V[:, None], lambda x, w: (x[..., None] * w).squeeze(-1)),
    "addcmul": Weighted(V, lambda x, w: torch.addcmul(torch.ones(6), x, w, value=0.5)),
    "addcdiv": Weighted(V, lambda x, w: torch.addcdiv(torch.ones(6), x, w, value=0.5)),
    "sub_alpha": lambda x: torch.sub(torch.ones(2, 6), x, alpha=3),
    "rsub_alpha": lambda x: torch.rsub(x, torch.ones(2, 6), alpha=3),
    "add_alpha": lambda x: torch.add(torch.ones(2, 6), x, alpha=-2),
    "lerp": lambda x: torch.lerp(torch.ones(2, 6), x, 0.25),
    "whole_lerp": lambda x: torch.lerp(x, torch.ones(2, 6), 1.0),
    "in_place": lambda x: x.clone().mul_(W).add_(1).div_(2),
}


@pytest.mark.parametrize("name", list(SCALES))
def test_scales(name: str) -> None:
    agree(SCALES[name], "rows", "linear")


def test_scales_of_images() -> None:
    weight = torch.rand(4, 1, 1) + 0.5
    agree(Weighted(weight, lambda x, w: x * w), "image", "conv2")
    agree(Weighted(weight, lambda x, w: (x * w).flatten(1)), "image", "linear")
    agree(Weighted(torch.rand(60) + 0.5, lambda x, w: x.flatten(1) * w), "image", "linear")


def test_a_weight_of_positions_counts_its_mean_square() -> None:
    weight = torch.rand(4, 3, 5)
    model = Between(Weighted(weight, lambda x, w: x * w), "image", "conv2")
    got = followed(lap_ext.trace(model, torch.randn(model.given)))
    roots = weight.square().mean((1, 2)).sqrt().tolist()
    assert got == pytest.approx({(c, c): roots[c] for c in range(4)}, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_padding_is_zero_or_a_constant(value: float) -> None:
    """An input that is always 0 counts 0: its weights go first; one that is constant counts 1."""
    model = Between(lambda x: F.pad(x, (1, 2), value=value), "rows", "linear")
    scores = lap_ext.scores(model, torch.randn(model.given))["b"] / model.b.weight.detach().abs()
    fed = model.a.weight.detach().norm(dim=1)
    ends = torch.full((3,), value)
    torch.testing.assert_close(scores, torch.cat([ends[:1], fed, ends[1:]]).expand(2, 9))
