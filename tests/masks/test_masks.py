# SPDX-License-Identifier: MIT
"""Masks as a mapping, their counts, and apply on every dtype and layout.

Names and what is refused: test_names.py. Files: test_file.py. Training:
test_training.py and test_wrappers.py. torch's own pruning: test_torch_prune.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.masks import Masks
from tests.helpers import masked_network as cases
from tests.helpers.parameters import each_dtype


def flags(*rows: str) -> Tensor:
    """A mask drawn with # (kept) and . (pruned)."""
    return torch.tensor([[sign == "#" for sign in row] for row in rows])


# --- a mapping with counts ------------------------------------------------------------------------


def test_mapping_and_counts() -> None:
    first, second = flags("#..", "##."), flags("....")
    masks = Masks({"b": first, "a": second})
    assert list(masks) == ["b", "a"] and len(masks) == 2
    assert masks["b"] is first and "a" in masks and "c" not in masks
    assert masks.counts() == {"b": (3, 6), "a": (0, 4)}
    assert (masks.kept, masks.total, masks.sparsity) == (3, 10, 0.7)
    assert repr(masks) == "Masks(2 layers, 3 of 10 weights kept, sparsity 0.7)"
    with pytest.raises(KeyError):
        masks["c"]


def test_nothing_to_count() -> None:
    for masks in (Masks({}), Masks({"empty": torch.ones(0, 3, dtype=torch.bool)})):
        assert (masks.kept, masks.total, masks.sparsity) == (0, 0, 0.0)
    assert repr(Masks({})) == "Masks(0 layers, 0 of 0 weights kept, sparsity 0)"


def test_counts_are_exact() -> None:
    """Above 2**24 a float32 sum would lose the odd ones."""
    n = 2**24 + 3
    mask = torch.ones(n, dtype=torch.bool)
    mask[5] = False
    assert Masks({"w": mask, "v": mask.view(1, n)}).kept == 2 * (n - 1)


def test_equality() -> None:
    mask = flags("#.", ".#")
    masks = Masks({"a": mask, "b": ~mask})
    assert masks == Masks({"b": ~mask, "a": mask.clone()})
    assert masks != Masks({"a": mask, "b": mask})
    assert masks != Masks({"a": mask})
    assert masks != Masks({"a": mask, "b": ~mask[:1]})
    assert masks != {"a": mask, "b": ~mask}
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks)


def test_the_structure_stays_with_the_masks_and_with_nothing_made_of_them() -> None:
    masks = Masks({"fc": torch.tensor([[True, False]])}, "1:2")
    assert masks.structure == masks.to("cpu").structure == Masks(masks).structure == "1:2"
    assert copy.deepcopy(masks).structure == pickle.loads(pickle.dumps(masks)).structure == "1:2"
    assert repr(masks) == "Masks(1 layer, 1 of 2 weights kept, sparsity 0.5, structure 1:2)"
    assert masks == Masks(dict(masks)) and Masks(dict(masks)).structure is None
    assert Masks({}, lap_ext.structures.Block(4, 2)).structure == "4x2"
    assert Masks({}, lap_ext.structures.Groups([[0]])).structure == "groups"
    assert Masks({}, "groups").structure == "groups"


def test_torch_prune_and_keep_take_masks_with_a_structure_as_any_others() -> None:
    layer = nn.Linear(4, 1)
    masks = Masks({"weight": torch.tensor([[True, False, False, True]])}, "2:4")
    masks.to_torch_prune(layer)
    masks.remove(layer)
    with masks.keep(layer, torch.optim.SGD(layer.parameters(), lr=1.0)):
        assert masks.check(layer) == {}


def test_the_mapping_is_its_own() -> None:
    given = {"a": flags("#.")}
    masks = Masks(given)
    given["b"] = flags("#.")
    assert list(masks) == ["a"]
    assert list(Masks(masks)) == ["a"]


def test_to(device: str) -> None:
    masks = Masks({"a": flags("#.")})
    moved = masks.to(device)
    assert moved == masks and moved["a"].device.type == device
    assert masks.to("cpu")["a"] is masks["a"]


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Masks([("a", flags("#"))]), TypeError, "expected a mapping of layer name -> bool"),
    (lambda: Masks({}, "4:2x"), ValueError, "expected structure to be 'N:M'"),
    (lambda: Masks({}, 3), TypeError, "expected structure to be a text such as"),
    (lambda: Masks({3: flags("#")}), TypeError, "expected layer names to be strings, got 3."),
    (lambda: Masks({"a": np.ones(2, bool)}), TypeError, "got ndarray. Use torch.from_numpy."),
    (lambda: Masks({"a": None}), TypeError, "expected 'a' to be a bool tensor, got NoneType."),
    (
        lambda: Masks({"a": torch.ones(2)}),
        TypeError,
        "expected a bool mask (True: kept), got torch.float32 for 'a'. Pass mask != 0.",
    ),
    (lambda: Masks({"a": torch.ones(2, dtype=torch.uint8)}), TypeError, "got torch.uint8 for 'a'"),
    (lambda: Masks({"a": flags("#.").to_sparse()}), TypeError, "layout torch.sparse_coo for 'a'"),
    (
        lambda: Masks({"a": torch.ones(2, dtype=torch.bool, device="meta")}),
        ValueError,
        "expected masks with data, got a meta tensor for 'a'.",
    ),
]


@pytest.mark.parametrize(("make", "kind", "text"), REFUSED, ids=[case[2] for case in REFUSED])
def test_refused(make: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value).startswith("Masks: expected ") and text in str(caught.value)


# --- apply: values --------------------------------------------------------------------------------


@each_dtype
def test_apply(dtype: torch.dtype, device: str) -> None:
    model = cases.net(dtype).to(device)
    masks = cases.random_masks(model).to(device)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    masks.apply(model)
    for name, parameter in model.named_parameters():
        mask = masks.get(name.removesuffix(".weight"), torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, torch.where(mask, before[name], 0.0)), name


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_apply_to_other_numbers(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    Masks({"weight": torch.tensor([True, False, True])}).apply(module)
    assert torch.equal(module.weight.to(torch.complex64), torch.tensor([1, 0, 1]) + 0j)


def test_whatever_stood_there_becomes_plus_zero() -> None:
    layer = nn.Linear(6, 1)
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, -1.0, -2.0]])
    layer.weight.data.copy_(odd)
    Masks({"weight": flags(".....#")}).apply(layer)
    assert layer.weight.tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, -2.0]]
    assert layer.weight.signbit().tolist() == [[False, False, False, False, False, True]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "permuted": lambda w: w.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every second": lambda w: torch.stack([w, w], -1)[..., 0],
    "offset": lambda w: torch.cat([w, w])[w.shape[0] :],
}


@pytest.mark.parametrize("of_mask", list(LAYOUTS))
@pytest.mark.parametrize("of_weight", list(LAYOUTS))
def test_layouts(of_weight: str, of_mask: str) -> None:
    values, mask = torch.randn(4, 3, 5, 2), torch.rand(4, 3, 5, 2) < 0.5
    layer = nn.Module()
    layer.weight = nn.Parameter(LAYOUTS[of_weight](values.clone()))
    strides = layer.weight.stride()
    Masks({"weight": LAYOUTS[of_mask](mask)}).apply(layer)
    assert torch.equal(layer.weight, torch.where(mask, values, 0.0))
    assert layer.weight.stride() == strides


def test_views_share_nothing_else() -> None:
    """A weight that is every second number of a buffer: the others stay."""
    buffer = torch.ones(2, 6)
    layer = nn.Module()
    layer.weight = nn.Parameter(buffer[:, ::2])
    Masks({"weight": flags("...", ".#.")}).apply(layer)
    assert buffer.tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 1, 1, 0, 1]]


def test_no_dimensions_and_no_elements() -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(3.0))
    module.gate = nn.Parameter(torch.tensor(2.0))
    module.empty = nn.Parameter(torch.empty(0, 4))
    masks = {"scale": torch.tensor(False), "gate": torch.tensor(True)}
    Masks({**masks, "empty": torch.ones(0, 4, dtype=torch.bool)}).apply(module)
    assert (module.scale.item(), module.gate.item()) == (0.0, 2.0)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for step in range(4):
        if step == 1:  # the count of steps has no dimensions either: it goes on
            Masks(masks).keep(module, optimizer)
        (module.scale * 3 + module.gate).backward()
        optimizer.step()
    assert module.scale.item() == 0.0 and optimizer.state[module.scale]["step"].item() == 4
    assert module.gate.item() != 2.0


def test_autograd_sees_the_change() -> None:
    layer = nn.Linear(3, 1)
    out = layer(torch.ones(3, requires_grad=True)).square()
    version = layer.weight._version
    Masks({"weight": flags("#.#")}).apply(layer)
    assert layer.weight._version > version and layer.weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_inside_no_grad_and_inference_mode() -> None:
    masks = Masks({"weight": flags("#.#")})
    for context in (torch.no_grad(), torch.inference_mode()):
        layer = nn.Linear(3, 1)
        with context:
            masks.apply(layer)
        assert layer.weight[0, 1] == 0
    with torch.inference_mode():
        layer = nn.Linear(3, 1)
        masks.apply(layer)
        assert layer.weight[0, 1] == 0
