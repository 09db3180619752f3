# SPDX-License-Identifier: MIT
"""lap_ext's masks in nncf's models; the oracle is a plain copy that lap_ext has pruned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext

pytest.importorskip("nncf", reason="the framework of this adapter")

import nncf

from lap_ext.adapters import nncf as adapter

LOCAL = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
GLOBAL = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
BY_GRADIENT = nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED
EXAMPLE = torch.zeros(2, 1, 6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().flatten(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)).tanh())


def prepared(model: nn.Module, ratio: float = 0.0, mode: Any = LOCAL, x: Tensor = EXAMPLE) -> Any:
    return nncf.prune(model, mode, ratio=ratio, examples_inputs=x)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in one.items())


def plain_copy(net: nn.Module) -> Net:
    """The parameters as they are, without nncf."""
    plain = Net()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "nncf" not in k})
    return plain


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(5, 1, 6, 6) for _ in range(count)]


def test_by_hand() -> None:
    """The very buffer that nncf multiplies with; the parameter is left alone."""
    net = nn.Linear(2, 2, bias=False)
    net.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    net = prepared(net, x=torch.ones(1, 2))
    (buffer,) = (b for name, b in net.named_buffers() if name.endswith("binary_mask"))
    assert buffer.tolist() == [[False, True], [True, True]]  # nncf prunes one at ratio=0
    adapter.write_masks_(net, {"weight": torch.tensor([[True, False], [False, True]])})
    (now,) = (b for name, b in net.named_buffers() if name.endswith("binary_mask"))
    assert now is buffer and buffer.tolist() == [[True, False], [False, True]]
    assert net(torch.ones(1, 2)).tolist() == [[1.0, 4.0]]
    assert net.weight.tolist() == [[1, 2], [3, 4]]
    kept = adapter.masks(net)
    assert list(kept) == ["weight"] and torch.equal(kept["weight"], buffer)
    kept["weight"].fill_(False)
    assert buffer.any(), "a copy"


@pytest.mark.parametrize("mode", [LOCAL, GLOBAL], ids=lambda mode: mode.name)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_as_the_plain_model(mode: Any, scope: str) -> None:
    net = Net()
    plain = copy.deepcopy(net)
    masks = lap_ext.prune(plain, EXAMPLE, 0.75, scope=scope).masks
    net = prepared(net, 0.3, mode)
    adapter.write_masks_(net, masks)
    assert adapter.masks(net) == masks
    (x,) = batches(1)
    assert torch.equal(net(x), plain(x))
    statistic = nncf.pruning_statistic(net)
    assert statistic.pruning_ratio == masks.sparsity == 0.75
    for row in statistic.pruned_tensors:
        kept, total = masks.counts()[row.tensor_name.removesuffix(".weight")]
        assert row.pruned_ratio == (total - kept) / total


def test_batch_norm_adaptation() -> None:
    """The running statistics of a plain pruned model that sees the same batches."""
    net = Net()
    plain = copy.deepcopy(net)
    masks = lap_ext.prune(plain, EXAMPLE, 0.8).masks
    net = prepared(net)
    adapter.write_masks_(net, masks)
    data = batches()
    net = nncf.batch_norm_adaptation(net, nncf.Dataset(data))
    plain.eval()
    plain.bn.train()
    for x in data:
        plain(x)
    assert not torch.equal(plain.bn.running_mean, torch.zeros(4))
    for mine, theirs in ((net.bn.running_mean, plain.bn.running_mean),
                         (net.bn.running_var, plain.bn.running_var)):  # fmt: skip
        assert torch.equal(mine, theirs)
    assert adapter.masks(net) == masks


def test_steps_of_training_between_prunings() -> None:
    """Each time scored as nncf computes it; what is pruned gets no gradient and never returns."""
    net = prepared(Net())
    adapter.write_masks_(net, {name: m | True for name, m in adapter.masks(net).items()})
    optimizer = torch.optim.AdamW(net.parameters(), 0.05, weight_decay=0.1)
    before = adapter.masks(net)
    for sparsity in (0.4, 0.7, 0.6, 0.9):
        for x in batches(2):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            for name, mask in before.items():
                assert not net.get_parameter(f"{name}.weight").grad[~mask].any()
            optimizer.step()
        plain = plain_copy(net)
        expected = lap_ext.prune(plain, EXAMPLE, sparsity, masks=before)
        weights = [p.clone() for p in net.parameters()]
        result = adapter.prune_(net, EXAMPLE, sparsity)
        assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
        assert result.masks == expected.masks == adapter.masks(net)
        assert result.layers == expected.layers
        assert all(not (mask & ~before[name]).any() for name, mask in result.masks.items())
        (x,) = batches(1)
        assert torch.equal(net.eval()(x), plain.eval()(x))
        net.train()
        before = result.masks
    assert before.sparsity == pytest.approx(0.9, abs=0.01)


def test_only_what_nncf_masks() -> None:
    """A layer of nncf's ignored scope is a neighbor and no more."""
    scope = nncf.IgnoredScope(patterns=["fc/.*"])
    net = nncf.prune(Net(), LOCAL, ratio=0.0, ignored_scope=scope, examples_inputs=EXAMPLE)
    adapter.write_masks_(net, {"conv": torch.ones(4, 1, 3, 3, dtype=torch.bool)})
    topology_free = copy.deepcopy(net.fc.weight)
    result = adapter.prune_(net, EXAMPLE, 0.5, criterion="magnitude")
    assert list(result.masks) == ["conv"] and result.kept == 18
    assert torch.equal(net.fc.weight, topology_free)
    with pytest.raises(ValueError, match="'fc': nncf has no mask on it"):
        adapter.write_masks_(net, {"fc": torch.ones(3, 64, dtype=torch.bool)})


def test_options_of_prune() -> None:
    net = prepared(Net())
    everything = {name: m | True for name, m in adapter.masks(net).items()}
    adapter.write_masks_(net, everything)
    result = adapter.prune_(net, {"x": EXAMPLE}, 0.5, exclude="conv", scope="global")
    assert list(result.masks) == ["fc"] and adapter.masks(net)["conv"].all()
    plain = plain_copy(net)
    again = lap_ext.prune(plain, EXAMPLE, {"fc": 0.5}, exclude=["conv"])
    assert again.masks == result.masks
    copied = adapter.prune_(net, None, 0.5, topology=lap_ext.trace(plain, EXAMPLE))
    assert copied.kept <= result.kept + adapter.masks(net)["conv"].numel()


def test_a_layer_without_a_mask_keeps_its_own() -> None:
    net = prepared(Net())
    adapter.write_masks_(net, {"fc": torch.zeros(3, 64, dtype=torch.bool)})
    assert adapter.masks(net).counts() == {"conv": (35, 36), "fc": (0, 192)}


def test_pruned_by_nncf_twice() -> None:
    """masks is what the model computes with."""
    net = prepared(prepared(Net(), 0.5), 0.7, GLOBAL)
    plain = plain_copy(net)
    adapter.masks(net).apply(plain)
    (x,) = batches(1)
    assert torch.equal(net.eval()(x), plain.eval()(x))
    adapter.write_masks_(net, {name: mask | True for name, mask in adapter.masks(net).items()})
    assert torch.equal(net(x), plain_copy(net).eval()(x))


def test_a_mask_on_a_buffer() -> None:
    """nncf masks the constants of products too: they are no layers, and stay as nncf has them."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(3, 4))
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x @ self.table)

    x = torch.randn(5, 3)
    net = prepared(Table(), 0.5, x=x)
    table = net.get_buffer("__nncf_hooks.post_hooks.table__0.0.binary_mask")
    before = table.clone()
    assert list(adapter.masks(net)) == ["fc"] and not table.all()
    assert list(adapter.prune_(net, x, 0.75).masks) == ["fc"]
    assert torch.equal(table, before)
    with pytest.raises(ValueError, match="'table': the model has no such parameter"):
        adapter.write_masks_(net, {"table": before})


def test_a_layer_that_the_trace_does_not_meet() -> None:
    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, early: bool = False) -> Tensor:
            return self.first(x) if early else self.second(self.first(x))

    x = torch.randn(5, 3)
    net = prepared(Exits(), x=x)
    before = adapter.masks(net)
    result = adapter.prune_(net, {"x": x, "early": True}, 0.5)
    assert list(result.masks) == ["first"]
    assert adapter.masks(net) == lap_ext.Masks({**before, **result.masks})


@pytest.mark.parametrize("name", ["embed", "head", "head.weight"])
def test_a_tied_weight_under_any_name(name: str) -> None:
    net = prepared(Tied(), x=torch.zeros(1, 3, dtype=torch.long))
    mask = torch.rand(7, 4) < 0.5
    adapter.write_masks_(net, {name: mask})
    assert torch.equal(adapter.masks(net)["embed"], mask)
    tokens = torch.arange(7)[None]
    weight = net.embed.weight * mask
    mixed = nn.functional.embedding(tokens, weight) @ (
        net.mix.weight * adapter.masks(net)["mix"]).T  # fmt: skip
    expected = (mixed + net.mix.bias).tanh() @ weight.T
    torch.testing.assert_close(net(tokens), expected)
    with pytest.raises(ValueError, match=r"'head': the same parameter as another one \(tied\)"):
        adapter.write_masks_(net, {"embed": mask, "head": mask})
    result = adapter.prune_(net, tokens, 0.9)
    assert list(result.masks) == ["embed", "mix"] and adapter.masks(net) == result.masks


def test_saved_and_loaded() -> None:
    net = prepared(Net())
    masks = adapter.prune_(net, EXAMPLE, 0.6).masks
    again = nncf.torch.load_from_config(Net(), nncf.torch.get_config(net))
    again.load_state_dict(net.state_dict())
    assert adapter.masks(again) == masks
    assert torch.equal(again.eval()(EXAMPLE), net.eval()(EXAMPLE))
    assert adapter.prune_(again, EXAMPLE, 0.8).masks == adapter.prune_(net, EXAMPLE, 0.8).masks


def test_openvino_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants of the exported model are the masked weights."""
    monkeypatch.setenv("CI", "true")  # it sends no statistics then
    openvino = pytest.importorskip("openvino")
    net = prepared(Net()).eval()
    masks = adapter.prune_(net, EXAMPLE, 0.75, scope="global").masks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it traces with torch.jit, which is deprecated
        exported = openvino.convert_model(net, example_input=EXAMPLE)
    constants = {
        tuple(op.get_output_shape(0)): int((op.data != 0).sum())
        for op in exported.get_ops()
        if op.get_type_name() == "Constant"
    }
    counts = masks.counts()
    assert constants[4, 1, 3, 3] == counts["conv"][0] and constants[3, 64] == counts["fc"][0]
    compiled = openvino.compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (x,) = batches(1)
    torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), net(x).detach())


FULL = {"conv": torch.ones(4, 1, 3, 3) == 1, "fc": torch.zeros(3, 64) == 1}

MISFITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (FULL | {"fc2": FULL["fc"]}, ValueError, "got 1 that do not:\n  'fc2': the model has no such"),
    (FULL | {"fc": FULL["fc"].T}, ValueError, "'fc': mask [64, 3], parameter [3, 64]"),
    (FULL | {"bn": torch.ones(4) == 1}, ValueError, "'bn': nncf has no mask on it"),
    (FULL | {"fc.weight": FULL["fc"]}, ValueError, "'fc.weight': the same parameter as another"),
    (
        FULL | {"fc": FULL["fc"].float()},
        TypeError,
        "write_masks_: expected a bool mask (True: kept)",
    ),
    (FULL | {"fc2": FULL["fc"], "x": FULL["fc"]}, ValueError, "parameter\n  'x': the model has"),
]


@pytest.mark.parametrize(("masks", "error", "text"), MISFITS, ids=lambda x: str(x)[:20])
def test_misfits_change_nothing(masks: dict[str, Any], error: type[Exception], text: str) -> None:
    net = prepared(Net(), 0.5)
    before = state(net)
    with pytest.raises(error) as caught:
        adapter.write_masks_(net, masks)
    assert text in str(caught.value)
    assert same(state(net), before)


def plain_model() -> nn.Module:
    return Net()


def by_gradient() -> nn.Module:
    return nncf.prune(Net(), BY_GRADIENT, examples_inputs=EXAMPLE)


@pytest.mark.parametrize("make", [plain_model, by_gradient])
def test_models_without_its_masks(make: Callable[[], nn.Module]) -> None:
    calls: list[tuple[str, Callable[[nn.Module], Any]]] = [
        ("masks", adapter.masks),
        ("write_masks_", lambda net: adapter.write_masks_(net, FULL)),
        ("prune_", lambda net: adapter.prune_(net, EXAMPLE, 0.5)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError) as caught:
            call(make())
        assert str(caught.value).startswith(f"{name}: expected a model with nncf's masks on its")
    with pytest.raises(TypeError, match=r"masks: expected model to be a torch.nn.Module, got str"):
        adapter.masks("net")


def test_an_error_while_scoring_changes_nothing() -> None:
    """nncf's hooks are out of the way for the trace, and back whatever happens."""
    net = prepared(Net(), 0.5)
    net.add_module("later", nn.Linear(1, 1))
    before, names, forward = state(net), [*net._modules], net.forward
    net.fc.weight.data[0, 0] = float("nan")
    for call in (
        lambda: adapter.prune_(net, EXAMPLE, 0.7),
        lambda: adapter.prune_(net, torch.zeros(1, 2), 0.7),
    ):
        with pytest.raises(ValueError):
            call()
        assert net.forward is forward and [*net._modules] == names
    net.fc.weight.data.copy_(before["fc.weight"])
    assert same(state(net), before)


def test_a_forward_of_the_users_own() -> None:
    """A model whose forward was replaced before nncf took it: that one is traced."""
    net = Net()
    net.bn.weight.data.copy_(torch.tensor([1.0, 20.0, 0.1, 5.0]))
    net.forward = lambda x: net.fc(net.conv(x).flatten(1))  # type: ignore[method-assign]
    net = prepared(net)
    plain = plain_copy(net)
    plain.forward = lambda x: plain.fc(plain.conv(x).flatten(1))  # type: ignore[method-assign]
    masks = adapter.masks(net)
    expected = lap_ext.prune(plain, EXAMPLE, 0.6, masks=masks, apply=False).masks
    assert adapter.prune_(net, EXAMPLE, 0.6).masks == expected
