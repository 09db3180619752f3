# SPDX-License-Identifier: MIT
"""From names to parameters, through wrappers and ties, and everything that is refused.

When an error is raised, nothing has changed. Messages are part of the interface.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lap_ext.masks import Masks
from tests.helpers import masked_network as cases


def flags(*rows: str) -> Tensor:
    """A mask drawn with # (kept) and . (pruned)."""
    return torch.tensor([[sign == "#" for sign in row] for row in rows])


class Attention(nn.Module):
    """A parameter not called weight, a tied pair, and a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.experts = nn.ParameterList([torch.ones(2, 2), torch.ones(3, 2)])


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("attn.in_proj_weight", "attn.in_proj_weight"),
        ("attn.out_proj", "attn.out_proj.weight"),
        ("attn.out_proj.weight", "attn.out_proj.weight"),
        ("attn.out_proj.bias", "attn.out_proj.bias"),
        ("experts.1", "experts.1"),
        ("embed", "head.weight"),
        ("head", "embed.weight"),
    ],
)
def test_names(name: str, parameter: str) -> None:
    model = Attention()
    weight = model.get_parameter(parameter)
    weight.data.fill_(1.0)
    mask = torch.rand(weight.shape) < 0.5
    Masks({name: mask}).apply(model)
    assert torch.equal(weight != 0, mask)


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    """The model as wrappers hand it out."""
    if kind == "compile":
        return torch.compile(model, backend="eager")
    if kind == "DataParallel":
        return nn.DataParallel(model)
    if kind == "average of compiled":
        return AveragedModel(torch.compile(model, backend="eager"))
    if kind == "compiled inside":
        model.conv = torch.compile(model.conv, backend="eager")
        model.fc1 = torch.compile(model.fc1, backend="eager")
        return model
    return AveragedModel(model) if kind == "AveragedModel" else model


KINDS = ["plain", "compile", "DataParallel", "AveragedModel", "average of compiled"]


@pytest.mark.parametrize("kind", [*KINDS, "compiled inside"])
def test_wrappers(kind: str) -> None:
    """Plain names on wrapped models, and the wrapped model's own names too."""
    model = wrapped(kind, cases.net())
    weights = {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    }
    masks = {n: torch.rand(w.shape) < 0.5 for n, w in weights.items()}
    plain = dict(zip(("conv", "fc1", "fc2"), masks.values(), strict=True))
    for names in (masks, plain):
        for weight in weights.values():
            weight.data.fill_(1.0)
        Masks(names).apply(model)
        for name, weight in weights.items():
            assert torch.equal(weight != 0, masks[name]), name


@pytest.mark.parametrize("name", ["0", "0.module", "0.module._orig_mod", "0.module.weight"])
def test_wrappers_inside(name: str) -> None:
    layer = nn.Linear(2, 1)
    model = nn.Sequential(nn.DataParallel(torch.compile(layer, backend="eager")), nn.Tanh())
    Masks({name: flags(".#")}).apply(model)
    assert layer.weight[0, 0] == 0 and layer.weight[0, 1] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_a_wrapped_model_on_the_plain_one(kind: str) -> None:
    model = cases.net()
    names = [
        name.removesuffix(".weight")
        for name, _ in wrapped(kind, model).named_parameters()
        if name.endswith("weight")
    ]
    Masks(
        {n: torch.zeros_like(model.get_submodule(n.split(".")[-1]).weight) != 0 for n in names}
    ).apply(model)
    assert not any(model.get_submodule(n).weight.any() for n in ("conv", "fc1", "fc2"))


def test_a_layer_may_be_called_module() -> None:
    """A user's own "module" is no wrapper where there is more beside it, and wins over one."""
    model = nn.ModuleDict({"module": nn.Linear(2, 1), "other": nn.Linear(2, 1)})
    Masks({"module": flags(".#")}).apply(model)
    assert model["module"].weight[0, 0] == 0 and model["other"].weight.all()
    with pytest.raises(ValueError, match="'weight': the model has no such parameter"):
        Masks({"weight": flags(".#")}).apply(model)
    Masks({"_orig_mod.module": flags("#.")}).apply(model)
    assert not model["module"].weight.any() and model["other"].weight.all()
    bare = nn.DataParallel(nn.Linear(2, 1))
    for name in ("module", "weight", "module.weight"):
        bare.module.weight.data.fill_(1.0)
        Masks({name: flags(".#")}).apply(bare)
        assert bare.module.weight.tolist() == [[0.0, 1.0]]


def test_a_users_module_beside_others() -> None:
    """Names are taken as they are first, and then as little is left out as finds a parameter."""
    inner = nn.ModuleDict({"module": nn.Linear(2, 1), "fc": nn.Linear(2, 1)})
    model = nn.ModuleDict({"module": inner, "fc": nn.Linear(2, 1)})
    for name, layer in {
        "module.fc": inner["fc"],
        "fc": model["fc"],
        "module.module.module": inner["module"],  # of DataParallel
        "_orig_mod.module.fc": inner["fc"],
    }.items():
        Masks({name: flags("..")}).apply(model)
        assert not layer.weight.any(), name
        layer.weight.data.fill_(1.0)
        assert all(p.any() for p in model.parameters()), name
    scaled = nn.Module()
    scaled.gate = nn.Parameter(torch.ones(2, 1))
    scaled.module = nn.Linear(2, 1)
    Masks({"gate": flags("#", "."), "module": flags(".#")}).apply(scaled)
    assert scaled.gate.tolist() == [[1.0], [0.0]] and scaled.module.weight[0, 0] == 0


# --- apply: what is refused, and nothing has changed ----------------------------------------------


def expand(model: nn.Sequential) -> None:
    model.fc2.weight = nn.Parameter(torch.ones(1, 8).expand(3, 8))


def lazy(model: nn.Sequential) -> None:
    model.fc2 = nn.LazyLinear(3)


def inference(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model.fc2 = nn.Linear(8, 3)


def meta(model: nn.Sequential) -> None:
    model.fc2.to_empty(device="meta")


def sparse(model: nn.Sequential) -> None:
    model.fc2.weight = nn.Parameter(torch.eye(3, 8).to_sparse())


class Elsewhere(Tensor):
    """A tensor whose numbers are not here, as DTensor."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def __new__(cls) -> Elsewhere:
        return Tensor._make_wrapper_subclass(cls, (3, 8))


def elsewhere(model: nn.Sequential) -> None:
    model.fc2._parameters["weight"] = Elsewhere()


def buffered(model: nn.Sequential) -> None:
    weight = model.fc2.weight.detach()
    del model.fc2.weight
    model.fc2.register_buffer("weight", weight)


def pruned(model: nn.Sequential) -> None:
    nn.utils.prune.identity(model.fc2, "weight")


def renamed(model: nn.Sequential) -> None:
    model.last = model.fc2
    del model.fc2


def tied(model: nn.Sequential) -> None:
    model.fc1.weight = model.fc2.weight = nn.Parameter(torch.ones(8, 64))


BROKEN: list[tuple[Callable[[nn.Sequential], None], str]] = [
    (expand, "'fc2': elements of its parameter share memory (shape [3, 8], strides [0, 1])"),
    (lazy, "'fc2': its parameter is not initialized yet. Run the model once"),
    (inference, "'fc2': its parameter was made in inference mode and cannot be changed"),
    (meta, "'fc2': mask on cpu, parameter on meta. Use masks.to(device)"),
    (sparse, "'fc2': expected a plain dense parameter, got Parameter, torch.sparse_coo"),
    (elsewhere, "'fc2': expected a plain dense parameter, got Elsewhere, torch.strided"),
    (buffered, "'fc2': fc2.weight is no parameter but a buffer or an attribute, which cannot"),
    (
        pruned,
        "'fc2': pruned with torch.nn.utils.prune, which keeps its own mask. Call masks.remove",
    ),
    (renamed, "'fc2': the model has no such parameter.\nLayers of the model without a mask: last."),
    (tied, "'fc2': the same parameter as 'fc1' (tied). Leave one of the two out"),
]


@pytest.mark.parametrize(("break_it", "text"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_apply_and_keep_refuse(break_it: Callable[[nn.Sequential], None], text: str) -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD([*model.conv.parameters(), *model.fc1.parameters()], 0.1)
    break_it(model)
    before = model.conv.weight.clone()
    for method in ("apply", "keep"):
        with pytest.raises(ValueError) as caught:
            masks.apply(model) if method == "apply" else masks.keep(model, optimizer)
        start = (
            f"Masks.{method}: expected masks that fit the model, got 1 that do not. They are:\n  "
        )
        assert str(caught.value).startswith(start + text), str(caught.value)
    assert torch.equal(model.conv.weight, before)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_all_that_does_not_fit_is_listed() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    masks = {"0": flags("##", "##"), "1": flags("##"), "2": torch.tensor(True)}
    masks |= {f"x{i}": flags("#") for i in range(12)}
    with pytest.raises(ValueError) as caught:
        Masks(masks).apply(model)
    lines = str(caught.value).split("\n")
    assert (
        lines[0] == "Masks.apply: expected masks that fit the model, got 14 that do not. They are:"
    )
    assert lines[1:4] == [
        "  '1': mask [1, 2], parameter [2, 2].",
        "  '2': mask [], parameter [2, 2].",
        "  'x0': the model has no such parameter.",
    ]
    assert lines[11] == "  and 4 more."
    names = ", ".join(str(i) for i in range(3, 13))
    assert lines[12] == f"Layers of the model without a mask: {names} and 17 more."


def test_wrong_arguments() -> None:
    masks = Masks({"fc1": torch.ones(8, 64, dtype=torch.bool)})
    with pytest.raises(TypeError, match=r"Masks.apply: expected model to be .*, got OrderedDict"):
        masks.apply(cases.net().state_dict())
    with pytest.raises(TypeError, match=r"Masks.keep: expected a torch.optim.Optimizer .*StepLR"):
        masks.keep(
            cases.net(), torch.optim.lr_scheduler.StepLR.__new__(torch.optim.lr_scheduler.StepLR)
        )

    class Proxy(torch.optim.Optimizer):
        """As accelerate's: an Optimizer by class, not by construction."""

        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"\(with step hooks\), got Proxy"):
        masks.keep(cases.net(), Proxy())
    with pytest.raises(ValueError, match=r"got one that has none of the 1\. Make it from"):
        masks.keep(cases.net(), torch.optim.SGD(cases.net().parameters(), 0.1))


def test_sparse_gradients_are_refused_before_the_step() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Masks({"0": torch.eye(3) == 1, "1": torch.ones(4, 3) == 1}).keep(model, optimizer)
    (model[0](torch.ones(3)).sum() + model[1](torch.tensor([1])).sum()).backward()
    before = [p.clone() for p in model.parameters()]
    grad = model[0].weight.grad.clone()
    with pytest.raises(TypeError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "Masks.keep, layer '1': expected dense gradients, got layout torch.sparse_coo. "
        "An Embedding needs sparse=False."
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(model[0].weight.grad, grad)


def test_expanded_gradients() -> None:
    """A gradient that repeats one number cannot be written in place."""
    layer = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    handle = Masks({"weight": flags("#.#")}).keep(layer, optimizer)
    layer.weight.grad = torch.ones(1, 1).expand(1, 3)
    handle.mask_gradients()
    assert layer.weight.grad.tolist() == [[1.0, 0.0, 1.0]]
