# SPDX-License-Identifier: MIT
"""Minitron and REAP: against what hooks see, and against loops over tokens and experts by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext import checkpoint, criteria
from lap_ext.criteria.context import Network
from lap_ext.criteria.statistics.replay import elements
from lap_ext.places import Memory
from tests.helpers.checkpoints import write
from tests.helpers.topologies import traced
from tests.zoo.hf import BATCHED, GROUPED, MIXTRAL, QWEN3_MOE, hf, text

C, H, E = 6, 5, 4
TIGHT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-9}


def prepared(
    name: str, model: nn.Module, inputs: Any, data: Any, place: type[Memory] = Memory
) -> tuple[criteria.UnitCriterion, Network]:
    """A criterion, and a network that has its statistics."""
    criterion = criteria.of(name)
    assert isinstance(criterion, criteria.UnitCriterion)
    network = Network(place(lap_ext.trace(model, inputs)))
    criterion.prepare(network, data)
    return criterion, network


# --- Minitron -------------------------------------------------------------------------------------


class Inputs:
    """Sums over batch elements of the squared means of |x|, by layer, of what modules are given."""

    def __init__(self, model: nn.Module, batch_dims: dict[str, int] | None = None) -> None:
        self.sums: dict[str, Tensor] = {}
        self.dims = batch_dims or {}
        for name, module in model.named_modules():
            if type(module) in (nn.Linear, nn.Conv2d) or type(module).__name__ == "Conv1D":
                module.register_forward_pre_hook(lambda m, x, name=name: self.add(name, m, x[0]))

    def add(self, name: str, module: nn.Module, x: Tensor) -> None:
        channels = 1 if isinstance(module, nn.Conv2d) else x.dim() - 1
        batch = self.dims.get(name, 0)
        rest = [dim for dim in range(x.dim()) if dim not in (batch, channels)]
        means = x.detach().double().abs()
        means = means.mean(rest) if rest else means
        self.sums[name] = self.sums.get(name, 0) + means.square().sum(0)


def agree(
    model: nn.Module, inputs: Any, data: list[Any], dims: dict[str, int] | None = None
) -> int:
    """Compares all layers that hooks see, and counts them."""
    found = criteria.measure(model, inputs, "minitron", data)
    seen = Inputs(model, dims)
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for layer, total in seen.sums.items():
        tied = found.get("transformer.wte.absolute_mean.1")  # GPT-2's head
        want = found.get(f"{layer}.absolute_mean", tied)
        assert want is not None
        assert want.dtype == torch.float64
        torch.testing.assert_close(want, total.sqrt(), rtol=1e-4, atol=1e-6, msg=layer)
    return len(seen.sums)


def test_minitron_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    data = [
        torch.tensor([[[1.0, 3.0], [-3.0, 0.0]], [[0.0, 4.0], [0.0, 2.0]]]),
        torch.ones(1, 1, 2),
    ]
    # mean |x|: (2, 1.5), (0, 3), (1, 1); of what the second reads, (x0 - x1, 2 x0):
    # (-2, 2), (-3, -6) -> (2.5, 4); (-4, 0), (-2, 0) -> (3, 0); (0, 2)
    found = criteria.measure(net, torch.ones(1, 1, 2), "minitron", data)
    want = {"0.absolute_mean": [5.0, 12.25], "1.absolute_mean": [15.25, 20.0]}
    assert {name: x.square().tolist() for name, x in found.items()} == {
        name: pytest.approx(x, rel=1e-15) for name, x in want.items()
    }


@pytest.mark.parametrize("name", ["hf_llama_eager", "hf_gpt2_eager", "hf_bert_eager"])
def test_minitron_of_transformers(name: str) -> None:
    """GPT-2 multiplies all tokens of a batch as rows of one matrix."""
    topology = traced(name)
    keys = list(inspect.signature(topology.model.forward).parameters)
    data = [{"input_ids": torch.randint(3, 13, shape)} for shape in ((3, 5), (2, 7))]
    if "token_type_ids" in keys:
        data = [{**x, "attention_mask": torch.ones_like(x["input_ids"])} for x in data]
    assert agree(topology.model.eval(), data[0], data) >= 9


def test_minitron_of_pictures() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 3)
    )
    data = [torch.randn(n, 2, 6, 6) for n in (3, 1)]
    assert agree(net, torch.zeros(1, 2, 6, 6), data) == 3


class TimeFirst(nn.Module):
    """The batch lies elsewhere than in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().transpose(0, 1)).transpose(0, 1)


def test_wherever_the_batch_lies() -> None:
    """With as many positions as elements, shapes do not tell them apart."""
    assert agree(TimeFirst(), torch.ones(1, 3, 4), [torch.randn(3, 3, 4)], {"second": 1}) == 2


def test_batches_of_any_size_are_the_same() -> None:
    net, x = TimeFirst().double(), torch.randn(6, 3, 4).double()
    found = [criteria.measure(net, x[:1], "minitron", x.split(size)) for size in (6, 4, 1)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=0)


def test_elements_of_batches() -> None:
    model, ids, positions = TimeFirst(), torch.arange(6).reshape(3, 2), torch.arange(2)[None]
    rows = [ids[n : n + 1] for n in range(3)]
    for data, want in (
        ([ids, rows[0]], [*rows, rows[0]]),
        ([(ids, torch.zeros(3))], rows),  # a target
        ([{"x": ids}], rows),
    ):
        found = [x["x"] if isinstance(x, dict) else x[0] for x in elements(model, data)]
        assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    shared, scalar = {"x": ids, "y": [positions, torch.tensor(7.0)]}, torch.tensor(7.0)
    for row, x in zip(rows, elements(model, [shared]), strict=True):
        assert torch.equal(x["x"], row) and torch.equal(x["y"][0], positions)
        assert torch.equal(x["y"][1], scalar)
    nodes = {"x": ids, "edges": torch.zeros(2, 4)}  # of one graph
    (only,) = elements(model, [nodes])
    assert torch.equal(only["x"], ids) and torch.equal(only["edges"], nodes["edges"])


def test_a_weight_that_is_used_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(self.both(x).relu())

    model, x = Tied(), torch.randn(3, 2, 4)
    criterion, network = prepared("minitron", model, x, [x])
    inner = model.both(x).relu().detach()
    for role, given in zip(network.topology.roles, (x, inner), strict=True):
        want = given.double().abs().mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(criterion.column_scores(network, role), want)
        assert criterion.expert_scores(network, network.topology.layers["both"]) is None


# --- experts by hand ------------------------------------------------------------------------------


def by_hand(
    x: Tensor, index: Tensor, weights: Tensor, run: Callable[[int, Tensor], Tensor], experts: int
) -> tuple[list[float], list[int]]:
    """Sums over the tokens of each expert of g ||f||, and their numbers, one after another."""
    sums, counts = [0.0] * experts, [0] * experts
    for token in range(len(x)):
        for place in range(index.shape[1]):
            expert = int(index[token, place])
            f = run(expert, x[token]).double()
            norm = sum(float(value) ** 2 for value in f) ** 0.5
            sums[expert] += float(weights[token, place]) * norm
            counts[expert] += 1
    return sums, counts


def mean(found: list[tuple[list[float], list[int]]]) -> Tensor:
    """The means over all batches."""
    sums, counts = (torch.tensor(x, dtype=torch.float64).sum(0) for x in zip(*found, strict=True))
    return sums / counts.clamp(min=1)


MOE = QWEN3_MOE | {"moe_intermediate_size": 8}  # grouped products want rows of 16 bytes
PACKED = {
    "Mixtral": ("MixtralForCausalLM", MIXTRAL),
    "Qwen2Moe": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 6}),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", MOE | {"num_experts": 5}),
    "Qwen3Moe, normed": ("Qwen3MoeForCausalLM", MOE | {"norm_topk_prob": True}),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("Mixtral", "batched_mm"), ("Mixtral", "grouped_mm"), ("Qwen2Moe", "grouped_mm")),
        *(("Qwen3Moe", "batched_mm"), ("Qwen3Moe, normed", "grouped_mm")),
    ],
)
def test_reap_of_transformers(name: str, how: str) -> None:
    """The experts module is given the tokens, their experts and weights; the rest is by hand."""
    pytest.importorskip("transformers", minversion="5")
    kind, sizes = PACKED[name]
    entry = hf(name, kind, text, sizes, **(BATCHED if how == "batched_mm" else GROUPED))
    model, _, inputs = entry.make()
    data = [{"input_ids": torch.randint(3, 13, shape)} for shape in ((2, 6), (1, 3))]
    topology = lap_ext.trace(model, inputs)
    found = criteria.measure(model, None, "reap", data, topology=topology)
    columns = criteria.measure(model, None, "minitron", data, topology=topology)
    calls: dict[str, list[tuple[list[float], list[int]]]] = {}
    read: dict[str, list[Tensor]] = {}

    def hook(path: str, m: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
        def inner(expert: int, x: Tensor) -> Tensor:
            gate, up = (m.gate_up_proj[expert] @ x).chunk(2)
            return F.silu(gate) * up

        x, index, weights = given
        run = lambda expert, x: m.down_proj[expert] @ inner(expert, x)  # noqa: E731
        experts = m.down_proj.shape[0]
        calls.setdefault(path, []).append(by_hand(x, index, weights, run, experts))
        means = torch.zeros(experts, m.down_proj.shape[2], dtype=torch.float64)
        for expert in range(experts):
            own = [inner(expert, x[t]).double().abs() for t in (index == expert).nonzero()[:, 0]]
            means[expert] = torch.stack(own).mean(0) if own else 0.0
        read.setdefault(path, []).append(means.flatten())

    for path, module in model.named_modules():
        if path.endswith("experts"):
            module.register_forward_pre_hook(lambda m, x, path=path: hook(path, m, x))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    assert sorted(found) == sorted(f"{path}.down_proj.reap" for path in calls)
    for path, counted in calls.items():
        torch.testing.assert_close(found[f"{path}.down_proj.reap"], mean(counted), **TIGHT)
        assert found[f"{path}.down_proj.reap"].shape == (model.config.num_experts
            if "Moe" in name else 3,)  # fmt: skip

    read.clear()
    singles = [{"input_ids": row[None]} for batch in data for row in batch["input_ids"]]
    with torch.no_grad():
        for batch in singles:
            model(**batch)
    for path, means in read.items():
        want = torch.stack(means).square().sum(0).sqrt()
        torch.testing.assert_close(columns[f"{path}.down_proj.absolute_mean"], want, **TIGHT)


def test_reap_of_experts_with_biases() -> None:
    """GPT-OSS: weights [E, in, out], a bias for every expert; its output has it."""
    pytest.importorskip("transformers", minversion="5")
    sizes = MIXTRAL | {"num_local_experts": 3}
    found = []
    for how in (BATCHED, GROUPED):
        options: dict[str, Any] = {"config": "GptOssConfig", "attn_implementation": "eager", **how}
        model, _, inputs = hf("gpt_oss", "GptOssForCausalLM", text, sizes, **options).make()
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.5)
        torch.manual_seed(1)
        inputs = {"input_ids": torch.randint(3, 13, (2, 6))}
        found.append(criteria.measure(model, inputs, "reap", [inputs]))
        calls: dict[str, Tensor] = {}

        def hook(m: Any, given: Any, named: Any, path: str, calls: Any = calls) -> None:
            x, index, weights = (*given, *named.values())

            def run(expert: int, token: Tensor) -> Tensor:
                y = m.gate_up_proj[expert].T @ token + m.gate_up_proj_bias[expert]
                gate, up = y[::2].clamp(max=m.limit), y[1::2].clamp(-m.limit, m.limit)
                y = (up + 1) * gate * torch.sigmoid(gate * m.alpha)
                return m.down_proj[expert].T @ y + m.down_proj_bias[expert]

            calls[path] = mean([by_hand(x, index, weights, run, 3)])

        for path, module in model.named_modules():
            if path.endswith("experts"):
                module.register_forward_pre_hook(
                    lambda m, x, named, path=path: hook(m, x, named, path), with_kwargs=True
                )
        with torch.no_grad():
            model(**inputs)
        for path, want in calls.items():
            torch.testing.assert_close(found[-1][f"{path}.down_proj.reap"], want, rtol=1e-4, atol=0)
        assert len(calls) == 2


# --- experts of one's own -------------------------------------------------------------------------


class Expert(nn.Module):
    """Ends in what each case says."""

    def __init__(self, *end: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, H), nn.Linear(H, C)
        self.end = nn.Sequential(*end)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.down(F.relu(self.up(x))))


class WrittenNorm(nn.Module):
    """RMSNorm, in single operations: its own factor of each token is no router's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


Combine = Callable[[nn.ModuleList, Tensor, Tensor, Tensor], Tensor]


def sent(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each expert sees its own tokens."""
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = torch.where(index == number)
        y.index_add_(0, token, expert(x[token]) * weights[token, place, None])
    return y


def masked(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each expert sees all tokens; the weights of others are 0."""
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        y = y + (weights * (index == number)).sum(1, keepdim=True) * expert(x)
    return y


def spread(index: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(len(index), E, dtype=weights.dtype).scatter(1, index, weights)


def stacked(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    y = torch.stack([expert(x) for expert in experts], dim=1)
    return (spread(index, weights)[..., None] * y).sum(1)


def by_einsum(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    y = torch.stack([expert(x) for expert in experts])
    return torch.einsum("etc,te->tc", y, spread(index, weights))


def gathered(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Of all results, those of the chosen ones."""
    y = torch.cat([expert(x)[:, None] for expert in experts], dim=1)
    y = torch.gather(y, 1, index[..., None].expand(-1, -1, C))
    return (y * weights[..., None]).sum(1)


def indexed(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    y = torch.stack([expert(x) for expert in experts])
    y = y[index, torch.arange(len(x))[:, None]]
    return torch.einsum("tk,tkc->tc", weights, y)


WAYS: list[Combine] = [sent, masked, stacked, by_einsum, gathered, indexed]
ENDS: dict[str, Callable[[], list[nn.Module]]] = {
    "plain": list,
    "norm": lambda: [nn.LayerNorm(C)],
    "written": lambda: [WrittenNorm(), nn.Dropout(0.5)],
    "active": lambda: [nn.GELU()],
}


class Mixture(nn.Module):
    """A list of experts of which the router never chooses the last, and a shared one."""

    def __init__(self, way: Combine, end: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.way = way
        self.inlet, self.router, self.outlet = nn.Linear(3, C), nn.Linear(C, E), nn.Linear(C, 2)
        self.experts = nn.ModuleList(Expert(*end()) for _ in range(E))
        self.shared, self.gate = Expert(), nn.Linear(C, 1)
        self.router.bias.data[-1] = -1e3

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = torch.topk(self.router(x).softmax(-1), 2, dim=-1)
        return index, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x.flatten(0, -2))
        y = self.way(self.experts, x, *self.route(x))
        return self.outlet(x + y + self.gate(x).sigmoid() * self.shared(x))


CASES = [*((way, "plain") for way in WAYS), *((way, x) for way in (sent, stacked) for x in ENDS)]


@pytest.mark.parametrize(
    ("way", "end"),
    list(dict.fromkeys(CASES)),
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_reap_of_a_list_of_experts(way: Combine, end: str) -> None:
    """The shared expert has none; an expert that no token chose has 0."""
    model = Mixture(way, ENDS[end]).double().eval()
    data = [torch.randn(n, 4, 3).double() for n in (5, 2)]
    criterion, network = prepared("reap", model, data[0], data)
    counted = []
    with torch.no_grad():
        for batch in data:
            x = model.inlet(batch.flatten(0, -2))
            run = lambda expert, x: model.experts[expert](x)  # noqa: E731
            counted.append(by_hand(x, *model.route(x), run, E))
    want = mean(counted)
    assert float(want[-1]) == 0 and bool((want[:-1] > 0).all())
    found = {
        name: criterion.expert_scores(network, layer)
        for name, layer in network.topology.layers.items()
    }
    for expert in range(E):
        score = found.pop(f"experts.{expert}.down")
        assert score is not None and score.shape == (1,) and score.dtype == torch.float64
        torch.testing.assert_close(score, want[expert : expert + 1], rtol=1e-12, atol=0)
    assert set(found.values()) == {None}
    (role, *_) = network.topology.roles
    assert criterion.column_scores(network, role) is None


class Dense(nn.Module):
    """Packed experts that see every token, or are called one by one."""

    def __init__(self, one_by_one: bool, einsum: bool = False) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.one_by_one, self.einsum = one_by_one, einsum
        self.inlet, self.router, self.outlet = nn.Linear(3, C), nn.Linear(C, E), nn.Linear(C, 2)
        self.up = nn.Parameter(torch.randn(E, H, C))
        self.down = nn.Parameter(torch.randn(E, C, H))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.up[e]).relu(), self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        top, index = torch.topk(self.router(x).sigmoid(), 1, dim=-1)
        weights = spread(index, top)
        if self.one_by_one:
            y = sum(self.expert(e, x) * weights[:, e, None] for e in range(E))
        elif self.einsum:
            y = torch.einsum("teh,eoh->teo", torch.einsum("tc,ehc->teh", x, self.up).relu(),
                             self.down)  # fmt: skip
            y = torch.einsum("te,teo->to", weights, y)
        else:
            y = torch.bmm(torch.bmm(x.expand(E, -1, -1), self.up.mT).relu(), self.down.mT)
            y = (y * weights.t()[..., None]).sum(0)
        return self.outlet(y)


@pytest.mark.parametrize(("one_by_one", "einsum"), [(True, False), (False, True), (False, False)])
def test_reap_of_packed_experts_that_see_every_token(one_by_one: bool, einsum: bool) -> None:
    model, x = Dense(one_by_one, einsum).double(), torch.randn(9, 3).double()
    criterion, network = prepared("reap", model, x, [x])
    with torch.no_grad():
        inner = model.inlet(x)
        top, index = torch.topk(model.router(inner).sigmoid(), 1, dim=-1)
        want = mean([by_hand(inner, index, top, model.expert, E)])
    found = criterion.expert_scores(network, network.topology.layers["down"])
    assert found is not None
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    assert criterion.expert_scores(network, network.topology.layers["up"]) is None


# --- files, and mistakes --------------------------------------------------------------------------


class Elsewhere(Memory):
    """Weights that are not in memory."""

    held = False


def test_a_file_has_the_bits_of_its_data(tmp_path: Path) -> None:
    model, data = Mixture(stacked, list), [torch.randn(5, 4, 3)]
    for name in ("minitron", "reap"):
        save_file(criteria.measure(model, data[0], name, data), tmp_path / name)
        criterion, network = prepared(name, model, data[0], data)
        _, other = prepared(name, model, data[0], tmp_path / name, Elsewhere)
        found = [
            [
                *(criterion.column_scores(each, role) for role in each.topology.roles),
                *(criterion.expert_scores(each, x) for x in each.topology.layers.values()),
            ]
            for each in (network, other)
        ]
        for one, same in zip(*found, strict=True):
            assert (one is None) == (same is None)
            assert one is None or same is None or torch.equal(one, same)
        with pytest.raises(
            ValueError, match=rf"data for criterion '{name}' \(a file of statistics"
        ):
            prepared(name, model, data[0], data, Elsewhere)


WRONG: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("minitron", lambda x: x[:-1], r"'outlet\.absolute_mean' of shape \[6\] in data, got \[5\]"),
    ("minitron", lambda x: x - 9, r"'outlet\.absolute_mean' >= 0 in data, got -"),
    ("reap", lambda x: x.repeat(2), r"'experts\.0\.down\.reap' of shape \[1\] in data, got \[2\]"),
    ("reap", lambda x: -x, r"'experts\.0\.down\.reap' >= 0 in data, got -"),
    ("reap", lambda x: x * torch.nan, r"finite floating-point values of 'experts\.0\.down\.reap'"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_wrong_statistic(case: int, tmp_path: Path) -> None:
    name, edit, said = WRONG[case]
    model, x = Mixture(stacked, list), torch.randn(5, 4, 3)
    tensors = criteria.measure(model, x, name, [x])
    key = "outlet.absolute_mean" if name == "minitron" else "experts.0.down.reap"
    tensors[key] = edit(tensors[key]).contiguous()
    save_file(tensors, tmp_path / "statistics")
    criterion, network = prepared(name, model, x, tmp_path / "statistics")
    with pytest.raises(ValueError, match=f"expected {said}"):
        criterion.column_scores(network, network.topology.roles[-1])
        criterion.expert_scores(network, network.topology.layers["experts.0.down"])


def test_a_missing_statistic(tmp_path: Path) -> None:
    model, x = Mixture(stacked, list), torch.randn(5, 4, 3)
    save_file(criteria.measure(model, x, "reap", [x]), tmp_path / "statistics")
    criterion, network = prepared("minitron", model, x, tmp_path / "statistics")
    with pytest.raises(ValueError, match=r"'inlet\.absolute_mean' in data, got a file without"):
        criterion.column_scores(network, network.topology.roles[0])


@pytest.mark.parametrize("name", ["minitron", "reap"])
def test_outputs_that_are_not_finite(name: str) -> None:
    model, x = Mixture(stacked, list), torch.full((5, 4, 3), torch.inf)
    with pytest.raises(ValueError, match="expected finite activations, got inf or NaN in the "):
        criteria.measure(model, x, name, [x])


def test_a_model_without_experts() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r"^criteria\.measure: expected a model of experts .*, got"
    ):
        criteria.measure(net, torch.ones(1, 3), "reap", [torch.ones(2, 3)])


class Gated(nn.Module):
    """Factors of each token that no choice has made, and one that is chosen from the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(5))
        self.gate = nn.Linear(C, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        a, b, c, d, out = self.layers
        x = a(x) * mask[..., None]  # padding
        x = b(x) * self.gate(x).sigmoid()
        y = c(x)
        y = y / y.abs().max(-1, keepdim=True)[0]
        y = y * y.abs().max(-1, keepdim=True)[0]
        weights = self.gate(x).softmax(0)  # attention over positions
        return out((d(x) * weights).sum(0) + y)


def test_factors_that_are_no_routers() -> None:
    inputs = torch.randn(7, C), torch.ones(7)
    with pytest.raises(ValueError, match="expected a model of experts"):
        criteria.measure(Gated(), inputs, "reap", [inputs])


SAID = {
    "minitron": "structure='head' or structure='unit' for criterion 'minitron', which scores such",
    "reap": "structure='expert' for criterion 'reap', which scores such",
}


@pytest.mark.parametrize("name", SAID)
def test_they_score_units_alone(name: str, tmp_path: Path) -> None:
    """Before any data is read."""
    net, data = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), [object()]
    given: dict[str, Any] = {"criterion": name, "data": data}
    x = torch.ones(1, 3)
    for structure in ("row", "column", "2:4", "2x2"):
        with pytest.raises(ValueError, match=rf"^prune: expected {SAID[name]} .*'{structure}'\.$"):
            lap_ext.prune(net, x, 0.5, structure=structure, **given)
    single = f"expected {SAID[name]}.*, got single weights"
    with pytest.raises(ValueError, match=f"^prune: {single}"):
        lap_ext.prune(net, x, 0.5, **given)
    with pytest.raises(ValueError, match=f"^scores: {single}"):
        lap_ext.scores(net, x, **given)
    with pytest.raises(ValueError, match=f"^Pruner: {single}"):
        lap_ext.Pruner(net, x, lap_ext.schedule.one_shot(0.5, 1), **given)
    source = write(tmp_path / "dense", net.state_dict())
    with pytest.raises(ValueError, match=f"^checkpoint.prune: {single}"):
        checkpoint.prune(source, tmp_path / "out", 0.5, model=net, example_inputs=x, **given)
    criterion, network = criteria.of(name), Network(Memory(lap_ext.trace(net, x)))
    (chunk,) = network.place.chunks(network.topology.layers["0"])
    with pytest.raises(ValueError, match=single):
        criterion.weight(network, chunk)


def test_a_criterion_of_ones_own() -> None:
    class Ones(criteria.UnitCriterion):
        name = "ones"
        units = ("head",)

        def measure(self, topology: lap_ext.Topology, data: Any) -> dict[str, Tensor]:
            return {}

        def column_scores(self, network: Network, role: Any) -> Tensor:
            return torch.ones(role.part.channels[0], dtype=torch.float64)

    with pytest.raises(ValueError, match="expected structure='head' for criterion 'ones', which"):
        lap_ext.scores(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3), Ones(), data=[])
