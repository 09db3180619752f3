# SPDX-License-Identifier: MIT
"""A small program of a user of lap_ext, checked with mypy --strict against an installed wheel.

What a checker must reject carries a type: ignore, which --strict reports where nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.options import Normalize, Scope
from lap_ext.structures import Aggregate


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def program() -> None:
    """What a checker accepts and what runs."""
    model = network()
    x = torch.randn(1, 8)

    # one layer between its neighbors
    first, last = model[0].weight, model[2].weight
    assert isinstance(first, Tensor) and isinstance(last, Tensor)
    score: Tensor = lap_ext.score(None, first, last)
    norms: tuple[Tensor, Tensor] = lap_ext.neighbor_norms(None, first, last)
    kept: Tensor = lap_ext.mask_from_norms(first, *norms, sparsity=0.5)
    one: Tensor = lap_ext.topk_mask(score, keep=10)
    several: list[Tensor] = lap_ext.topk_mask([score, score], sparsity=0.5)

    # what is removed together
    blocks: lap_ext.structures.Structure = lap_ext.structures.Block(4, 4)
    groups = lap_ext.structures.Groups([list(range(64)), list(range(64, 128))])
    aggregate: Aggregate = "mean"
    kept = lap_ext.mask(None, first, last, structure="2:4")
    kept = lap_ext.mask(None, first, last, sparsity=0.5, structure="row", aggregate="exact")
    kept = lap_ext.mask_from_norms(first, *norms, keep=64, structure=blocks, aggregate=aggregate)
    kept = lap_ext.prune_(None, first.detach().clone(), last, keep=64, structure=groups)
    one = lap_ext.topk_mask(score, structure=lap_ext.structures.NM(2, 4, axis="out"))
    several = lap_ext.topk_mask([score, score], keep=99, structure=blocks)

    # a model, with every kind of option
    topology: lap_ext.Topology = lap_ext.trace(model, {"input": x}, on_unsupported="cut")
    scores: dict[str, Tensor] = lap_ext.scores(model, x, "lookahead", normalize="lamp")

    @lap_ext.criteria.register("squares_of_a_user")
    def squares(layer: lap_ext.topology.Layer) -> Tensor:
        return layer.weight.detach().square()

    checked: Callable[[lap_ext.topology.Layer], Tensor] = squares  # register keeps the type
    scope: Scope = "global"
    normalize: Normalize = "norm"
    result: lap_ext.PruneResult = lap_ext.prune(
        model,
        (x,),
        lap_ext.erk(0.9),
        criterion=squares,
        scope=scope,
        normalize=normalize,
        order="parallel",
        rounds=2,
        layers=["0", "2"],
        exclude="2",
        batch_norm="fold",
        residual="chain",
        on_progress=lambda progress: print(progress.done, progress.total),
        apply=False,
    )
    result.apply(model)
    fraction: float = lap_ext.sparsity(model)
    table: str = f"{result}{result._repr_html_()}{topology}"

    # while it trains
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = lap_ext.Pruner(
        model, None, lap_ext.cubic(0.9, start=0, end=10), optimizer=optimizer, topology=topology
    )
    step: lap_ext.PruneResult | None = pruner.step()
    with result.masks.keep(model, optimizer) as handle:
        handle.mask_gradients()

    try:
        lap_ext.trace(model, x)
    except lap_ext.TopologyError as error:
        parts: tuple[str, str, str, str | None] = (
            error.expected,
            error.got,
            error.cure,
            error.layer,
        )
    except lap_ext.LapError as error:
        name: str | None = error.function


def prune_directory(source: str, target: str) -> lap_ext.checkpoint.CheckpointResult:
    """Submodules are attributes."""
    verdict = lap_ext.checkpoint.verify(target, source, sparsity=0.5, scope="layer")
    assert verdict.ok
    return lap_ext.checkpoint.prune(source, target, 0.5, memory="4GB", batch_norm="edge")


def rejected() -> None:
    """What a checker rejects; it is never run."""
    model, x = network(), torch.randn(1, 8)
    lap_ext.prune(model, x, 0.5, scope="all")  # type: ignore[arg-type]
    lap_ext.prune(model, x, 0.5, batch_norm="paper")  # type: ignore[arg-type]
    lap_ext.prune(model, x, 0.5, residual="ignore")  # type: ignore[arg-type]
    lap_ext.prune(model, x, 0.5, order="up")  # type: ignore[arg-type]
    lap_ext.prune(model, x, 0.5, normalize="max")  # type: ignore[arg-type]
    lap_ext.prune(model, x, 0.5, bn="edge")  # type: ignore[call-arg]
    lap_ext.scores(model, x, on_unsupported="stop")  # type: ignore[arg-type]
    lap_ext.trace(model, x, kwargs={})  # type: ignore[call-arg]
    lap_ext.Pruner(model, x, lap_ext.one_shot(0.5), scope="all")  # type: ignore[arg-type]
    lap_ext.checkpoint.prune("a", "b", 0.5, scope="all")  # type: ignore[arg-type]
    lap_ext.mask(None, x, None, structure=4)  # type: ignore[arg-type]
    lap_ext.mask(None, x, None, keep=1, structure="row", aggregate="sum")  # type: ignore[arg-type]
    lap_ext.topk_mask(x, structure="row", mask=[x > 0])  # type: ignore[call-overload]
    lap_ext.structures.NM(2, 4, axis="rows")  # type: ignore[arg-type]
    lap_ext.structures.Block(4)  # type: ignore[call-arg]
    lap_ext.paper([0.5], 2)  # type: ignore[attr-defined]
