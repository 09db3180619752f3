# SPDX-License-Identifier: MIT
"""Those who run sparse weights take 2:4 masks: torch's packed format, and what TensorRT reads.

Torch packs 2:4 weights of f16, bf16 and int8 on the CPU. Its packed f32 format holds 1:2, for which
its converter back is wrong (torch 2.13): f32 is left out here.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import _semi_structured_conversions as conversions

import lap_ext

GPU = torch.cuda.is_available()


def pruned(dtype: torch.dtype, **options: Any) -> nn.Sequential:
    """Two layers whose weights are 2:4, of sizes that the packed format has."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(dtype)
    lap_ext.prune(net, torch.zeros(1, 64, dtype=dtype), structure="2:4", **options)
    return net


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("criterion", ["lookahead", "magnitude", "random"])
def test_packed_and_unpacked(criterion: str, dtype: torch.dtype) -> None:
    """Every kept weight comes back, at its place."""
    for layer in pruned(dtype, criterion=criterion)[::2]:
        dense = layer.weight.detach()
        assert int(dense.count_nonzero()) == dense.numel() // 2
        packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(dense)
        assert packed.shape == (dense.shape[0], dense.shape[1] // 2)
        back = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
        assert torch.equal(back, dense)


@pytest.mark.parametrize("structure", ["row", "2:4/out", "3:4"])
def test_what_is_not_packed(structure: str) -> None:
    """The check sees other structures: they do not come back."""
    layer = nn.Linear(64, 64).half()
    sparsity = 0.5 if structure == "row" else None
    lap_ext.prune(layer, torch.zeros(1, 64).half(), sparsity, structure=structure)
    dense = layer.weight.detach()
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    back = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
    assert not torch.equal(back, dense)


def test_fewer_than_two_come_back_too() -> None:
    """A mask of an earlier pruning may leave fewer than two of four."""
    net = nn.Sequential(nn.Linear(64, 128)).half()
    inputs = torch.zeros(1, 64).half()
    lap_ext.prune(net, inputs, 0.7, criterion="magnitude")
    lap_ext.prune(net, inputs, structure="2:4", criterion="magnitude")
    dense = net[0].weight.detach()
    assert 0 < int(dense.count_nonzero()) < dense.numel() // 2
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, meta), dense)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_that_runs_on_sparse_tensor_cores(dtype: torch.dtype) -> None:
    from torch.sparse import to_sparse_semi_structured

    layer = pruned(dtype)[0].cuda()
    x = torch.randn(64, 64, dtype=dtype, device="cuda")
    want, weight = layer(x), layer.weight.detach()
    sparse = to_sparse_semi_structured(weight)
    assert torch.equal(sparse.to_dense(), weight)
    layer.weight = nn.Parameter(sparse)
    torch.testing.assert_close(layer(x), want, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_transpose_of_a_transposable_pattern() -> None:
    from torch.sparse import to_sparse_semi_structured

    net = nn.Sequential(nn.Linear(128, 128)).half().cuda()
    lap_ext.prune(net, torch.zeros(1, 128).half().cuda(), structure="2:4/transposable")
    weight = net[0].weight.detach()
    for matrix in (weight, weight.T.contiguous()):
        assert torch.equal(to_sparse_semi_structured(matrix).to_dense(), matrix)


def convolutions() -> nn.Sequential:
    """Kernels of several sizes, groups, and a linear layer; the first has three inputs."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, (1, 5), groups=2), nn.ReLU()),
        *(nn.Conv2d(16, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 8)),
    ).eval()


def is_sparse(weight: Tensor, axis: int) -> bool:
    """Whether at most two of four are not zero along an axis, at every other position."""
    if weight.shape[axis] % 4:
        return False
    groups = weight.movedim(axis, -1).reshape(-1, 4)
    return bool(((groups != 0).sum(1) <= 2).all())


@pytest.fixture
def exported() -> dict[str, Tensor]:
    """The weights of a pruned network in an ONNX file, by name."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    net, inputs = convolutions(), torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"2:4 does not fit some layers, .*: '0' "):
        lap_ext.prune(net, inputs, structure="2:4")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(net, (inputs,), file, dynamo=True, verbose=False)
    graph = onnx.load_from_string(file.getvalue()).graph
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    kinds = {name: node.op_type for node in graph.node for name in node.input}
    weights = {x: torch.tensor(y) for x, y in arrays.items() if y.ndim > 1}
    assert {kinds[name] for name in weights} == {"Conv", "Gemm"}
    return weights


def test_the_axis_that_tensorrt_reads(exported: dict[str, Tensor]) -> None:
    """For Conv, groups of four input channels at one kernel position; the weight is [O, I/g, H, W].

    TensorRT's guide, "Structured sparsity": at least two of every four entries along C are zero for
    each output channel and each spatial position of the kernel, in KCRS. For Gemm it is along K.
    """
    kernels = {name: x for name, x in exported.items() if x.ndim == 4}
    first = [name for name, x in kernels.items() if x.shape[1] == 3]
    assert len(kernels) == 4 and len(first) == 1 and kernels[first[0]].all()
    for name, kernel in kernels.items():
        assert is_sparse(kernel, 1) == (name not in first)
    wide = [x for x in kernels.values() if x.shape == (16, 8, 3, 3)]
    assert len(wide) == 1 and not is_sparse(wide[0], 0)  # the check sees another axis
    assert not is_sparse(wide[0].flatten(1), 1)  # and the order in memory
    (linear,) = (x for x in exported.values() if x.ndim == 2)
    assert linear.shape == (8, 12) and is_sparse(linear, 1)


def test_an_exported_program_has_the_axis() -> None:
    """Without ONNX: the weights of torch.export's program, which exporters read."""
    net, inputs = convolutions(), torch.randn(1, 3, 8, 8)
    lap_ext.prune(net, inputs, structure="2:4", exclude=["0"], strict=True)
    state = torch.export.export(net, (inputs,)).state_dict
    weights = {name: x.detach() for name, x in state.items() if x.ndim > 1}
    assert [is_sparse(x, 1) for x in weights.values()] == [False, True, True, True, True]
    assert int(weights["2.weight"].count_nonzero()) == weights["2.weight"].numel() // 2


def test_torch_ao_has_the_same_pattern() -> None:
    """Its own sparsifier for 2:4, given magnitudes: the same mask of a linear layer."""
    from torch.ao.pruning import WeightNormSparsifier

    net = nn.Sequential(nn.Linear(64, 32))
    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    masks = lap_ext.prune(
        net, torch.zeros(1, 64), structure="2:4", criterion="magnitude", apply=False
    ).masks
    sparsifier.prepare(net, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(net[0].parametrizations.weight[0].mask.bool(), masks["0"])


def test_model_optimizer_takes_the_masks() -> None:
    """NVIDIA's own check of a 2:4 mask."""
    pytest.importorskip("modelopt")
    from modelopt.torch.sparsity.weight_sparsity import magnitude

    layer = nn.Linear(64, 32)
    masks = lap_ext.prune(layer, torch.zeros(1, 64), structure="2:4", criterion="magnitude").masks
    (mask,) = masks.values()
    assert torch.equal(magnitude.create_asp_mask(layer.weight.detach(), "2:4").bool(), mask)
