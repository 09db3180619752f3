# SPDX-License-Identifier: MIT
"""Steps "bits" and "hostile-...": every operator gives the CPU's bits, also in graphs, on streams.

Data and layouts are those of the tests. The other side is the native CPU library; in a rehearsal,
where that is what is tested, the pure reference. A result that differs is described so that it can
be made again, and the check goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import lap_ext
from benchmarks import checks
from benchmarks.gpu.device import Device, Graph
from benchmarks.gpu.steps import NotRunError, Save, each
from lap_ext.ops import reference, schema
from lap_ext.ops.reference.common import score_dtype
from tests.helpers import layer_cases as cases

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


MOST_MISMATCHES = 20  # of a check; it then ends
SHOWN = 5  # differing values of a mismatch


def run(device: Device, limit_s: float, save: Save) -> None:
    """Runs all checks of this step, independent of each other."""
    del limit_s  # the parent keeps it
    device.require_kernels()
    each({name: partial(check, device) for name, check in CHECKS.items()}, save)


def run_hostile(dtype: torch.dtype, device: Device, limit_s: float, save: Save) -> None:
    """Checks hostile data of one dtype: the other side needs a core for a minute."""
    del limit_s
    device.require_kernels()
    each({name: partial(hostile, device, dtype, [name]) for name in cases.HOSTILE}, save)


class MismatchError(checks.WrongResultError):
    """Results that differ between the device and the other side."""


class Pair:
    """Operators on the device and on the other side; compared bit for bit, to the last one."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._other = REFERENCE if device.rehearse else schema
        self.compared = 0
        self.mismatches: list[str] = []

    def same(self, op: str, *args: Any) -> None:
        """Calls op on both sides with the same arguments (CPU tensors)."""
        here, there = self._called(op, list(args), list(args))
        if here is not None:
            for i, (got, expected) in enumerate(zip(here, there, strict=True)):
                where = f"[{i}]" if len(there) > 1 else ""
                self._compare(op, args, where, got, expected)

    def prune(self, w: Tensor, *args: Any) -> None:
        """Compares prune_, which also changes w: mask and weights."""
        here, there = _like(w, self._device.device), _like(w, torch.device("cpu"))
        masks, expected = self._called("prune_", [here, *args], [there, *args])
        if masks is not None:
            self._compare("prune_", (w, *args), "", masks[0], expected[0])
            self._compare("prune_", (w, *args), "'s weights", here.cpu(), there)

    def result(self) -> str:
        """Tells how many were equal; raises if one was not."""
        if self.mismatches:
            count = f"{len(self.mismatches)} of {self.compared} results differ:"
            raise MismatchError("\n".join([count, *self.mismatches]))
        return f"{self.compared} results"

    def _called(self, op: str, here: list[Any], there: list[Any]) -> tuple[Any, Any]:
        """Returns both sides' results; (None, None) if either raised, which is a mismatch."""
        sides = (schema, _moved(here, self._device.device)), (self._other, there)
        found: list[list[Tensor]] = []
        for where, (side, args) in zip(
            (self._device.device.type, "the other side"), sides, strict=True
        ):
            try:
                found.append([x.cpu() for x in _listed(getattr(side, op)(*args))])
            except (RuntimeError, ValueError, TypeError) as error:
                text = str(error).strip().splitlines() or [type(error).__name__]
                self._note(f"{described(op, there)}: {where} raised {text[0]}")
                return None, None
        return found[0], found[1]

    def _compare(
        self, op: str, args: Sequence[Any], where: str, got: Tensor, expected: Tensor
    ) -> None:
        self.compared += 1
        found = difference(got, expected)
        if found is not None:
            self._note(f"{described(op, args)}: {op}{where}: {found}")

    def _note(self, text: str) -> None:
        self.mismatches.append(text)
        if len(self.mismatches) == MOST_MISMATCHES:
            self.result()


def described(op: str, args: Sequence[Any]) -> str:
    """Describes an operator's call: tensors by dtype, shape and strides, the rest by value."""
    parts = []
    for argument, value in zip(getattr(schema, op)._schema.arguments, args, strict=True):
        parts.append(f"{argument.name}={_described(value)}")
    return f"{op}({', '.join(parts)})"


def _described(x: Any) -> str:
    if isinstance(x, list):
        more = [f"{len(x) - 4} more"] if len(x) > 4 else []
        return f"[{', '.join([*map(_described, x[:4]), *more])}]"
    if isinstance(x, Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{dtype} {list(x.shape)} strides {list(x.stride())}"
    return str(x)


def difference(got: Tensor, expected: Tensor) -> str | None:
    """Describes what differs, signs of zeros and NaNs included, by flat indices; or None."""
    if got.dtype != expected.dtype:
        return f"{got.dtype} for {expected.dtype}"
    if got.shape != expected.shape:
        return f"{list(got.shape)} for {list(expected.shape)}"
    if torch.equal(_bytes(got), _bytes(expected)):
        return None
    wrong = (_bytes(got) != _bytes(expected)).view(got.numel(), -1).any(1).nonzero().flatten()
    ours, theirs = got.flatten(), expected.flatten()
    first = [f"[{i}] {ours[i].item()!r} for {theirs[i].item()!r}" for i in wrong[:SHOWN].tolist()]
    return f"{len(wrong)} of {got.numel()} values differ: {', '.join(first)}"


def equal_bits(got: Tensor, expected: Tensor, what: str) -> None:
    """Raises, and says where, unless both are equal."""
    found = difference(got, expected)
    checks.require(found is None, f"{what}: {found}")


def global_mask(
    w: list[Tensor],
    row_norm: list[Tensor],
    col_norm: list[Tensor],
    groups: list[int],
    keep: int,
    masks: list[Tensor],
    check_finite: bool,
) -> list[Tensor]:
    """Defines global_mask: topk_mask of all scores; a weight without norms is its own score."""
    scores = [
        reference.score(x, cols, rows, count, False, check_finite) if rows.numel() else x
        for x, rows, cols, count in zip(w, row_norm, col_norm, groups, strict=True)
    ]
    return reference.topk_mask(scores, keep, masks, check_finite)


REFERENCE = SimpleNamespace(
    **{name: getattr(reference, name) for name in reference.__all__}, global_mask=global_mask
)


def _bytes(x: Tensor) -> Tensor:
    flat = x.contiguous().as_strided((x.numel(),), (1,))  # view() minds the strides of one element
    return flat.view(torch.uint8)


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, list):
        return [_moved(part, device) for part in x]
    return x.to(device) if isinstance(x, Tensor) else x


def _listed(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def _like(w: Tensor, device: torch.device) -> Tensor:
    """Copies values and strides to a device, into memory of its own."""
    span = 1 + sum((n - 1) * s for n, s in zip(w.shape, w.stride(), strict=True) if n > 0)
    memory = torch.empty(max(span, 1), dtype=w.dtype, device=device)
    return memory.as_strided(w.shape, w.stride()).copy_(w)


# --- the checks -----------------------------------------------------------------------------------


def layouts(device: Device) -> str:
    """Checks every shape, dtype and memory layout, ordinary data."""
    torch.manual_seed(1)
    pair = Pair(device)
    for shape in cases.SHAPES:
        for dtype in DTYPES:
            w, ins, outs = cases.random_layer(shape, dtype)
            kinds = shape.groups, shape.transposed, True
            keep, eligible = w.numel() // 3, torch.rand(w.shape) < 0.8
            for name in cases.layouts_of(w.dim()):
                laid = cases.LAYOUTS[name](w)
                pair.same("row_squared_norms", laid, True, "w_prev")
                pair.same("col_squared_norms", laid, shape.groups, True, "w_next")
                pair.same("squared_norms", laid, shape.groups, True, "w")
                for scale in (1.0, 1e-25):
                    pair.same("score", laid, ins * scale, outs, *kinds)
                    pair.same("mask", laid, ins * scale, outs * scale, keep, None, *kinds)
                pair.same("mask", laid, ins, outs, keep, eligible, *kinds)
                pair.prune(laid, ins, outs, keep, eligible, *kinds)
    return pair.result()


def hostile(device: Device, dtype: torch.dtype, names: Sequence[str] = tuple(cases.HOSTILE)) -> str:
    """Checks ties, zeros of both signs, denormals, sorted and periodic data."""
    torch.manual_seed(2)
    pair = Pair(device)
    cols = 1009 if not device.rehearse else 33
    rows = device.sizes.hostile // cols
    for name in names:
        for width in (cols, cols // 8 * 8):  # rows of whole vectors have kernels of their own
            w = cases.hostile(name, rows * width, dtype).view(rows, width)
            ins = torch.rand(width, dtype=torch.float64)
            outs = torch.rand(rows, dtype=torch.float64)
            pair.same("score", w, ins, outs, 1, False, True)
            for keep in (w.numel() // 100, w.numel() // 2):
                pair.same("mask", w, ins, outs, keep, None, 1, False, True)
                pair.same("topk_mask", [w[:5].clone(), w[5:].clone()], keep, [], True)
                pair.same("kth_largest", [w[:5].clone(), w[5:].clone()], keep, True)
    return pair.result()


def equal_data(device: Device) -> str:
    """Checks one value everywhere: every element ties, and the first ones are kept."""
    pair = Pair(device)
    rows, cols = (1024, 768) if not device.rehearse else (40, 48)
    ins, outs = torch.full((cols,), 0.75).double(), torch.full((rows,), 3.0).double()
    for dtype in DTYPES:
        for value in (-0.375, 0.0):
            w = torch.full((rows, cols), value, dtype=dtype)
            for keep in (0, 1, cols + 1, w.numel() // 2, w.numel() - 1, w.numel()):
                pair.same("mask", w, ins, outs, keep, None, 1, False, True)
                pair.prune(w, ins, outs, keep, None, 1, False, True)
                pair.same("topk_mask", [w[:3].clone(), w[3:].clone()], keep, [], True)
                if keep:
                    pair.same("kth_largest", [w], keep, True)
    return pair.result()


def far(device: Device) -> str:
    """Checks norms far apart: a mask of none or of all needs no products of them."""
    torch.manual_seed(5)
    pair = Pair(device)
    rows, cols = (300, 256) if not device.rehearse else (30, 24)
    ins = torch.logspace(-200, 200, cols, dtype=torch.float64)
    outs = torch.logspace(-200, 200, rows, dtype=torch.float64)
    for dtype in DTYPES:
        w = torch.randn(rows, cols).to(dtype)
        eligible = torch.rand(w.shape) < 0.8
        for keep in (0, w.numel()):
            for check_finite in (True, False):
                kinds = 1, False, check_finite
                pair.same("mask", w, ins, outs, keep, None, *kinds)
                pair.prune(w, ins, outs, keep, None, *kinds)
        for keep in (0, int(eligible.sum())):
            pair.same("mask", w, ins, outs, keep, eligible, 1, False, True)
            pair.prune(w, ins, outs, keep, eligible, 1, False, True)
    return pair.result()


def ranked_together(device: Device) -> str:
    """Checks global_mask: layers of several dtypes, groups and sizes, and given scores."""
    torch.manual_seed(6)
    pair = Pair(device)
    scale = 1 if not device.rehearse else 16
    shapes = (
        ((96 // scale, 64 // scale), 1),
        ((512 // scale, 64 // scale, 3, 3), 4),
        ((1000 // scale, 1023 // scale), 1),
        ((1, 1), 1),
    )
    lists = (
        (torch.float32, torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16,) * 4,
        (torch.float64,) * 4,
    )
    for dtypes in lists:
        layers = list(zip(shapes, dtypes, strict=True))
        w = [torch.randn(shape).to(dtype) for (shape, _), dtype in layers]
        rows = [torch.rand(shape[0]).double() + 0.5 for shape, _ in shapes]
        cols = [torch.rand(shape[1] * count).double() + 0.5 for shape, count in shapes]
        counts = [count for _, count in shapes]
        masks = [torch.rand(x.shape) < 0.8 for x in w]
        n = sum(x.numel() for x in w)
        none = torch.empty(0, dtype=torch.float64)
        for keep in (0, n // 100, n // 2):
            pair.same("global_mask", w, rows, cols, counts, keep, [], True)
            pair.same("global_mask", w, rows, cols, counts, keep, masks, True)
            ready = [w[0].abs().to(score_dtype(dtypes[0])), *w[1:]]
            pair.same(
                *("global_mask", ready, [none, *rows[1:]], [none, *cols[1:]], counts, keep, []),
                False,
            )
        pair.same("global_mask", w, rows, cols, counts, n, [], True)
    return pair.result()


def large(device: Device) -> str:
    """Checks shapes of real layers: linear, convolution, grouped, transposed."""
    torch.manual_seed(3)
    pair = Pair(device)
    scale = 1 if not device.rehearse else 32
    shapes = (
        ((4096 // scale, 3072 // scale), 1, False),
        ((512 // scale, 256 // scale, 3, 3), 1, False),
        ((512 // scale, 64 // scale, 3, 3), 4, False),
        ((256 // scale, 512 // scale, 4, 4), 1, True),
        ((1000 // scale, 2047 // scale), 1, False),
    )
    for shape, groups, transposed in shapes:
        for dtype in DTYPES:
            w = torch.randn(shape).to(dtype)
            across, along = shape[1] * groups, shape[0]
            into, out = (along, across) if transposed else (across, along)
            norms = torch.rand(into).double() + 0.5, torch.rand(out).double() + 0.5
            kinds = groups, transposed, True
            pair.same("score", w, *norms, *kinds)
            for part in (2, 10, 100):
                pair.same("mask", w, *norms, w.numel() // part, None, *kinds)
            pair.prune(w, *norms, w.numel() // 10, None, *kinds)
            pair.same("row_squared_norms", w, True, "w_prev")
            pair.same("col_squared_norms", w, groups, True, "w_next")
            pair.same("squared_norms", w, groups, True, "w")
    return pair.result()


def errors(device: Device) -> None:
    """Checks inf and NaN: the same error on both sides, the same bits without the check."""
    torch.manual_seed(4)
    pair = Pair(device)
    for dtype in DTYPES:
        w = torch.randn(100, 72).to(dtype)
        w[3, 4:7], w[90, 1] = float("inf"), float("nan")
        ins, outs = torch.rand(72).double(), torch.rand(100).double() + 0.1
        for keep in (0, 1, 4, 1000, w.numel()):
            pair.same("mask", w, ins, outs, keep, None, 1, False, False)
        calls: list[Callable[[Tensor], Any]] = [
            lambda x: lap_ext.score(None, x, None),
            lambda x: lap_ext.mask(None, x, None, sparsity=0.5),
            lambda x: lap_ext.prune_(None, x, None, sparsity=0.5),
            lambda x: lap_ext.neighbor_norms(x, torch.ones(2, 100).to(x), None),
            lambda x: lap_ext.kth_largest(x, 5),
        ]
        for call in calls:
            texts = [_error(call, x) for x in (w.to(device.device), w)]
            checks.require(texts[0] == texts[1], f"errors differ: {texts}")
    pair.result()


def _error(call: Callable[[Tensor], Any], x: Tensor) -> str:
    before = x.clone()
    try:
        call(x)
    except ValueError as error:
        same = torch.equal(x.nan_to_num(), before.nan_to_num())
        checks.require(same, "weights changed although an error was raised")
        return str(error)
    return "no error"


def twice(device: Device) -> None:
    """Checks that a repeated call gives the same bits, ties or not."""
    n = device.sizes.hostile * (20 if device.cuda else 1) // 64 * 64
    for name in ("random", "three_values", "zeros_60"):
        w = cases.hostile(name, n, torch.float32).view(-1, 64).to(device.device)
        first = lap_ext.mask(None, w, None, sparsity=0.7)
        for _ in range(5):
            checks.equal(lap_ext.mask(None, w, None, sparsity=0.7), first)


def graphs(device: Device) -> None:
    """Checks that a captured graph, replayed on other data, gives what an ordinary call gives."""
    side = 1024 if device.cuda else 32
    w, scores = (device.normal((side, side), i, torch.float32) for i in (1, 2))
    norms = device.uniform(side, 3), device.uniform(side, 4)
    keep = side * side // 5
    calls: dict[str, Callable[[], Any]] = {
        "mask": partial(lap_ext.mask, w, w, w, keep=keep, check_finite=False),
        "mask_from_norms": partial(
            lap_ext.mask_from_norms, w, *norms, keep=keep, check_finite=False
        ),
        "score": partial(lap_ext.score, w, w, w, check_finite=False),
        "topk_mask": partial(lap_ext.topk_mask, [w, scores], keep=keep, check_finite=False),
        "kth_largest": partial(lap_ext.kth_largest, scores, keep, check_finite=False),
        "neighbor_norms": partial(lap_ext.neighbor_norms, w, w, w, check_finite=False),
    }
    captured = {name: Graph(device, call) for name, call in calls.items()}
    for seed in (5, 6):
        w.copy_(device.normal((side, side), seed, torch.float32))
        scores.copy_(device.normal((side, side), seed + 10, torch.float32))
        for name, graph in captured.items():
            graph.replay()
            device.wait()
            for got, expected in zip(_listed(graph.result), _listed(calls[name]()), strict=True):
                equal_bits(got, expected, f"graph of {name}")


def streams(device: Device) -> None:
    """Checks work enqueued on the caller's stream: it reads data made there."""
    side = 2048 if device.cuda else 32
    source = device.normal((side, side), 1, torch.float32)
    expected = lap_ext.mask(None, source.neg().mul(3), None, sparsity=0.9)
    for _ in range(5):
        with device.other_stream():
            w = source.neg().mul(3)
            got = lap_ext.mask(None, w, None, sparsity=0.9, check_finite=False)
            count = got.sum()
        device.wait()
        checks.equal(got, expected)
        checks.require(int(count) == int(expected.sum()), "the count was taken too early")


def devices(device: Device) -> str:
    """Tensors of a second GPU while the first is current."""
    if not device.cuda or torch.cuda.device_count() < 2:
        raise NotRunError("one device only")
    other = torch.device("cuda", 1)
    w = device.normal((512, 512), 1, torch.float32)
    with torch.cuda.device(0):
        there = lap_ext.mask(None, w.to(other), None, sparsity=0.9)
        checks.require(there.device == other, f"the mask is on {there.device}")
        checks.equal(there.to(w.device), lap_ext.mask(None, w, None, sparsity=0.9))
        checks.require(torch.cuda.current_device() == 0, "the current device was changed")
    return "two devices"


CHECKS: dict[str, Callable[[Device], str | None]] = {
    "graphs": graphs,
    "streams": streams,
    "devices": devices,
    "errors": errors,
    "far": far,
    "twice": twice,
    "equal data": equal_data,
    "ranked together": ranked_together,
    "large": large,
    "layouts": layouts,
}
