# SPDX-License-Identifier: MIT
"""Prunes by lookahead scores with torch.nn.utils.prune: per layer, over all layers, or repeatedly.

A pruning method of torch sees one tensor and not the layer's neighbors, so scores are first
computed for the whole model:

    >>> import torch
    >>> from torch.nn.utils import prune
    >>> from lap_ext.adapters import torch_prune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> importance = torch_prune.scores(net, torch.ones(1, 4))  # as torch's importance_scores
    >>> prune.global_unstructured(list(importance), torch_prune.LookaheadUnstructured,
    ...                           importance_scores=importance, amount=0.75)
    >>> int(net[0].weight_mask.sum() + net[2].weight_mask.sum())  # of 32 + 16
    12
    >>> again = torch_prune.scores(net, torch.ones(1, 4))[net[2], "weight"]
    >>> net[2] = torch_prune.lookahead_unstructured(net[2], "weight", 0.5, again)  # of what is left

Unlike torch's own methods, those of this module are deterministic: exactly the requested number is
pruned, and of equal scores the one in the earlier layer, then at the lower index, is kept.

torch recomputes a pruned weight when its module is called. A weight that is used without calling
its module (MultiheadAttention.out_proj) is therefore not masked: leave it out with exclude.
`apply_global_` rejects such layers, and masks a tied weight in all modules that hold it.

copy.deepcopy of a module that torch has just pruned raises, because its weight is not a leaf of
autograd's graph: call the model once under torch.no_grad() first.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import prune

import lap_ext
from lap_ext import structures
from lap_ext.adapters._torch_hooks import plain, torch_masks
from lap_ext.allocation import Sparsity
from lap_ext.criteria import CriterionLike
from lap_ext.errors import LapTypeError, LapValueError, calling
from lap_ext.masks import layer_name
from lap_ext.options import (
    BatchNorm,
    Cost,
    Data,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Patterns,
    Residual,
)
from lap_ext.progress import Progress
from lap_ext.structures import Aggregate, StructureLike

ModuleWeight: TypeAlias = tuple[nn.Module, str]  # a module and the attribute that holds its weight


class LookaheadUnstructured(prune.BasePruningMethod):
    """Prunes the weights with the smallest importance scores, exactly as many as requested.

        float amount   keeps floor((1 - amount) * n + 1/2) of the n weights that are left
        int amount     prunes that many

    Use it in `prune.global_unstructured` and wherever else torch takes a pruning method. torch's
    L1Unstructured differs in three points: it ranks |score|, which keeps a score of -9; its choice
    among equal scores is not specified; and it rounds halves to even.

    Args:
        amount: how much to prune of the weights that are not pruned yet.

    Raises:
        TypeError: amount is not a real number.
        ValueError: amount is a float outside [0, 1] or a negative int.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 1)
        >>> scores = torch.tensor([[2.0, 1.0, 2.0]])
        >>> method = LookaheadUnstructured.apply(layer, "weight", 2, importance_scores=scores)
        >>> layer.weight_mask
        tensor([[1., 0., 0.]])
    """

    PRUNING_TYPE = "unstructured"

    @calling("LookaheadUnstructured")
    def __init__(self, amount: float) -> None:
        _check_amount(amount)
        self.amount: Any = amount  # any real number

    @calling("LookaheadUnstructured")
    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Computes the mask that keeps the best scores.

        Args:
            t: importance scores >= 0, in the weight's shape; or in 1-D, the scores of all weights
                that are left, of one layer or several.
            default_mask: ones of the shape of t, in the dtype that the mask should have.

        Returns:
            A tensor of ones and zeros like default_mask.

        Raises:
            ValueError: a score is negative or NaN, or is a parameter, or amount is more than is
                left.
        """
        kept = lap_ext.topk_mask(_checked(t), **self._count(t.numel()), check_finite=False)
        return default_mask * kept.to(default_mask)  # dtype and device

    def _count(self, left: int) -> dict[str, Any]:
        """Returns how many of the remaining weights to keep, as arguments of topk_mask."""
        if not isinstance(self.amount, numbers.Integral):
            return {"sparsity": self.amount}
        if int(self.amount) > left:
            raise LapValueError(
                f"{{argument}} <= {left} (the weights that are not pruned yet)",
                self.amount,
                argument="amount",
            )
        return {"keep": left - int(self.amount)}

    @classmethod
    @calling("LookaheadUnstructured")
    def apply(  # type: ignore[override]  # as in torch's own methods
        cls, module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Prunes a tensor of a module after checking everything.

        The module is changed only after all checks; torch's own `apply` removes the hook of an
        earlier pruning before it finds a mistake.

        Args:
            module: the module.
            name: its attribute that holds the weight.
            amount: how much to prune of the weights that are not pruned yet.
            importance_scores: `scores(model, ...)[module, name]`.

        Returns:
            The hook, as torch returns it.

        Raises:
            TypeError, ValueError: as in `LookaheadUnstructured`; also if the scores are missing, or
                differ in shape or device from the weight. The module was not changed.
        """
        weight = getattr(module, name)
        if importance_scores is None:
            raise LapTypeError(
                "{argument} (a module does not know its neighbors)",
                f"none for {name!r} of {type(module).__name__}",
                "Pass torch_prune.scores(model, example_inputs)[module, name].",
                argument="importance_scores",
            )
        if importance_scores.shape != weight.shape or importance_scores.device != weight.device:
            raise LapValueError(
                f"{{argument}} like {name} of {type(module).__name__}",
                f"{list(importance_scores.shape)} on {importance_scores.device} and "
                f"{list(weight.shape)} on {weight.device}",
                argument="importance_scores",
            )
        mask = getattr(module, f"{name}_mask", None)
        left = importance_scores if mask is None else importance_scores[mask == 1]
        cls(amount)._count(_checked(left).numel())
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)


@calling("lookahead_unstructured")
def lookahead_unstructured(
    module: nn.Module, name: str, amount: float, importance_scores: Tensor
) -> nn.Module:
    """Prunes the weights of one tensor that have the smallest scores, like torch's l1_unstructured.

    Args:
        module: the module.
        name: its attribute that holds the weight.
        amount: how much to prune of the weights that are not pruned yet: a fraction, or an int.
        importance_scores: `scores(model, ...)[module, name]`.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: as in `LookaheadUnstructured`; the module was not changed.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> for (module, name), importance in scores(net, torch.ones(1, 4)).items():
        ...     module = lookahead_unstructured(module, name, 0.75, importance)
        >>> int(net[0].weight_mask.sum()), int(net[2].weight_mask.sum())
        (8, 4)
    """
    LookaheadUnstructured.apply(module, name, amount, importance_scores=importance_scores)
    return module


@calling("scores")
def scores(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    criterion: CriterionLike = "lookahead",
    *,
    topology: lap_ext.Topology | None = None,
    normalize: Normalize = "auto",
    layers: Patterns | None = None,
    exclude: Patterns = (),
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    data: Data | None = None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
    on_progress: Callable[[Progress], Any] | None = None,
) -> dict[ModuleWeight, Tensor]:
    """Scores weights of a model, under the keys that torch.nn.utils.prune expects.

    Embeddings and output heads are left out unless layers names them, as in `lap_ext.prune`.

    A model that torch has already pruned is scored with its masks applied: only the weights that
    are left count in neighbor norms.

    Args:
        model: as in `lap_ext.prune`; pruned by torch.nn.utils.prune or not. It is not changed.
        example_inputs: as in `lap_ext.prune`.
        criterion: as in `lap_ext.prune`.
        topology: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        layers: as in `lap_ext.prune`.
        exclude: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        data: as in `lap_ext.prune`.
        neighbors: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        on_progress: as in `lap_ext.prune`.

    Returns:
        (module, attribute) -> scores >= 0 in the weight's shape. A tied weight is listed once.

    Raises:
        TopologyError, TypeError, ValueError: as in `lap_ext.scores`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> [(type(module).__name__, name) for module, name in scores(net, torch.ones(1, 1))]
        [('Linear', 'weight'), ('Linear', 'weight')]
    """
    with _unpruned(model, example_inputs, topology, neighbors, on_unsupported) as given:
        by_layer = lap_ext.scores(
            model,
            criterion=criterion,
            normalize=normalize,
            layers=layers,
            exclude=exclude,
            batch_norm=batch_norm,
            residual=residual,
            data=data,
            on_progress=on_progress,
            **given,
        )
    result = {}
    for name, importance in by_layer.items():
        path, _, attribute = given["topology"].layers[name].parameter.rpartition(".")
        result[model.get_submodule(path), attribute] = importance
    return result


@calling("global_masks")
def global_masks(
    model: nn.Module,
    example_inputs: Inputs | None,
    sparsity: Sparsity | None = None,
    *,
    topology: lap_ext.Topology | None = None,
    criterion: CriterionLike = "lookahead",
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    multiple_of: int = 1,
    strict: bool = False,
    cost: Cost | None = None,
    uniform: bool = False,
    normalize: Normalize = "auto",
    rounds: int = 1,
    layers: Patterns | None = None,
    exclude: Patterns = (),
    min_keep: MinKeep = None,
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    data: Data | None = None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
    on_progress: Callable[[Progress], Any] | None = None,
) -> lap_ext.Masks:
    """Computes masks for `prune.custom_from_mask` by one exact ranking over all layers.

    `prune.global_unstructured` needs several copies of all weights for the same masks; here nothing
    is concatenated and no score is sorted.

    Args:
        model: as in `lap_ext.prune`; pruned by torch.nn.utils.prune or not. It is not changed.
        example_inputs: as in `lap_ext.prune`.
        sparsity: as in `lap_ext.prune`; a fraction counts all weights, including those that torch
            has pruned, which never return.
        topology: as in `lap_ext.prune`.
        criterion: as in `lap_ext.prune`.
        structure: as in `lap_ext.prune`; N:M ranks each group by itself.
        aggregate: as in `lap_ext.prune`.
        multiple_of: as in `lap_ext.prune`.
        strict: as in `lap_ext.prune`.
        cost: as in `lap_ext.prune`.
        uniform: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        rounds: as in `lap_ext.prune`.
        layers: as in `lap_ext.prune`.
        exclude: as in `lap_ext.prune`.
        min_keep: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        data: as in `lap_ext.prune`.
        neighbors: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        on_progress: as in `lap_ext.prune`.

    Returns:
        Layer name -> mask.

    Raises:
        TopologyError, TypeError, ValueError: as in `lap_ext.prune`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> masks = global_masks(net, torch.ones(1, 4), 0.75)
        >>> module = prune.custom_from_mask(net[0], "weight", masks["0"])
        >>> masks.kept, masks.total
        (12, 48)
    """
    structure = None if structure is None else structures.of(structure)
    with _unpruned(model, example_inputs, topology, neighbors, on_unsupported) as given:
        return lap_ext.prune(
            model,
            sparsity=sparsity,
            criterion=criterion,
            structure=structure,
            aggregate=aggregate,
            multiple_of=multiple_of,
            strict=strict,
            cost=cost,
            uniform=uniform,
            scope="layer" if isinstance(structure, structures.NM) else "global",
            normalize=normalize,
            rounds=rounds,
            layers=layers,
            exclude=exclude,
            min_keep=min_keep,
            batch_norm=batch_norm,
            residual=residual,
            data=data,
            apply=False,
            on_progress=on_progress,
            **given,
        ).masks


@calling("apply_global_")
def apply_global_(
    model: nn.Module,
    example_inputs: Inputs | None,
    sparsity: Sparsity | None = None,
    *,
    topology: lap_ext.Topology | None = None,
    criterion: CriterionLike = "lookahead",
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    multiple_of: int = 1,
    strict: bool = False,
    cost: Cost | None = None,
    uniform: bool = False,
    normalize: Normalize = "auto",
    rounds: int = 1,
    layers: Patterns | None = None,
    exclude: Patterns = (),
    min_keep: MinKeep = None,
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    data: Data | None = None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
    on_progress: Callable[[Progress], Any] | None = None,
) -> lap_ext.Masks:
    """Prunes a model with torch.nn.utils.prune by the masks of `global_masks`.

    A layer that torch has already pruned gets its new mask in its existing buffer, so pruning in
    many steps takes no more memory than pruning in one.

    Args:
        model: as in `lap_ext.prune`; pruned by torch.nn.utils.prune or not.
        example_inputs: as in `lap_ext.prune`.
        sparsity: as in `global_masks`.
        topology: as in `lap_ext.prune`.
        criterion: as in `lap_ext.prune`.
        structure: as in `lap_ext.prune`; N:M ranks each group by itself.
        aggregate: as in `lap_ext.prune`.
        multiple_of: as in `lap_ext.prune`.
        strict: as in `lap_ext.prune`.
        cost: as in `lap_ext.prune`.
        uniform: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        rounds: as in `lap_ext.prune`.
        layers: as in `lap_ext.prune`.
        exclude: as in `lap_ext.prune`.
        min_keep: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        data: as in `lap_ext.prune`.
        neighbors: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        on_progress: as in `lap_ext.prune`.

    Returns:
        The masks. Their `remove(model)` makes the pruning permanent.

    Raises:
        TopologyError, TypeError, ValueError: as in `lap_ext.prune` and `Masks.to_torch_prune`.
            Nothing was changed.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> for sparsity in (0.5, 0.75):
        ...     masks = apply_global_(net, torch.ones(1, 4), sparsity)
        >>> int(net[0].weight_mask.sum() + net[2].weight_mask.sum())
        12
        >>> masks.remove(net)
        >>> prune.is_pruned(net)
        False
    """
    masks = global_masks(
        model,
        example_inputs,
        sparsity,
        topology=topology,
        criterion=criterion,
        structure=structure,
        aggregate=aggregate,
        multiple_of=multiple_of,
        strict=strict,
        cost=cost,
        uniform=uniform,
        normalize=normalize,
        rounds=rounds,
        layers=layers,
        exclude=exclude,
        min_keep=min_keep,
        batch_norm=batch_norm,
        residual=residual,
        data=data,
        neighbors=neighbors,
        on_unsupported=on_unsupported,
        on_progress=on_progress,
    )
    with plain(model) as hooks:
        names = {id(p): layer_name(name) for name, p in model.named_parameters()}
        pruned = [names[id(module._parameters[hook._tensor_name])] for module, hook in hooks]
    fresh = {name: mask for name, mask in masks.items() if name not in pruned}
    lap_ext.Masks(fresh).to_torch_prune(model)
    for name, (module, hook) in zip(pruned, hooks, strict=True):
        if name in masks:
            buffer = getattr(module, f"{hook._tensor_name}_mask")
            buffer.copy_((buffer != 0) & masks[name])  # of a bias, torch's own is not ours
            setattr(module, hook._tensor_name, hook.apply_mask(module))
    return masks


@contextmanager
def _unpruned(
    model: nn.Module,
    example_inputs: Inputs | None,
    topology: lap_ext.Topology | None,
    neighbors: Mapping[str, Any] | None,
    on_unsupported: OnUnsupported,
) -> Iterator[dict[str, Any]]:
    """Takes torch's pruning off a model for a while.

    Yields what lap_ext.scores and lap_ext.prune are given of it: the trace, which is made once for
    the names of the layers, and torch's masks.
    """
    with plain(model) as hooks:
        if topology is None:
            topology = lap_ext.trace(
                model, example_inputs, neighbors=neighbors, on_unsupported=on_unsupported
            )
            example_inputs = neighbors = None  # they are in the trace
        yield {
            "example_inputs": example_inputs,
            "topology": topology,
            "neighbors": neighbors,
            "masks": torch_masks(hooks, topology),
        }


def _check_amount(amount: Any) -> None:
    """Checks that an amount is a fraction or a count."""
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise LapTypeError(
            "{argument} to be a float (the fraction of the remaining weights to prune) or an int "
            "(how many)",
            type(amount).__name__,
            argument="amount",
        )
    if isinstance(amount, numbers.Integral):
        if int(amount) < 0:
            raise LapValueError("{argument} >= 0", amount, argument="amount")
    elif not 0 <= float(amount) <= 1:
        raise LapValueError(
            "0 <= {argument} <= 1 (the fraction of the remaining weights to prune)",
            amount,
            "A number of weights is an int.",
            argument="amount",
        )


def _checked(importance: Tensor) -> Tensor:
    """Returns the scores, if they are scores: no parameters, and >= 0."""
    if importance.requires_grad:
        raise LapValueError(
            "importance scores for every tensor",
            "parameters (they require a gradient; torch uses the weight itself where no score is "
            "given)",
            "Pass importance_scores=torch_prune.scores(model, example_inputs).",
        )
    if importance.numel():
        lowest = importance.min()  # NaN if there is one
        if not bool(lowest >= 0):
            raise LapValueError(
                "importance scores >= 0",
                lowest.item(),
                "Where no score is given, torch uses the weight itself; for magnitudes pass abs().",
            )
    return importance.detach()
