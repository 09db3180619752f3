# SPDX-License-Identifier: MIT
"""Lookahead scores in torch.nn.utils.prune: per layer, over all layers, again and again.

A pruning method of torch sees one tensor and not the layer's neighbors, so that scores are computed
for the whole model first:

    >>> import torch
    >>> from torch.nn.utils import prune
    >>> from lap_ext.adapters import torch_prune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = torch_prune.scores(net, torch.ones(1, 4))  # as importance_scores are asked for
    >>> prune.global_unstructured(
    ...     list(found), torch_prune.LookaheadUnstructured, importance_scores=found, amount=0.75)
    >>> int(net[0].weight_mask.sum() + net[2].weight_mask.sum())  # of 32 + 16
    12
    >>> again = torch_prune.scores(net, torch.ones(1, 4))[net[2], "weight"]
    >>> net[2] = torch_prune.lookahead_unstructured(net[2], "weight", 0.5, again)  # of what is left

What torch's own methods leave to chance is fixed here: exactly the number asked for is pruned, and
of equal scores the one of the earlier layer, then of the lower index, is kept.

torch recomputes a pruned weight when its module is called, so a weight that is read from outside
(MultiheadAttention.out_proj) is not pruned by it: leave it out with exclude. `apply_global_` refuses
such layers, and masks a tied weight in all its places.

copy.deepcopy of a module that torch has just pruned raises, for its weight is no leaf of autograd's
graph: call the model once under torch.no_grad() first.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import prune

import lap_ext
from lap_ext.masks import layer_name

Place: TypeAlias = tuple[nn.Module, str]  # a module and the attribute that holds the weight
Hooks: TypeAlias = list[tuple[nn.Module, Any]]  # modules and torch's pruning hooks on them


class LookaheadUnstructured(prune.BasePruningMethod):
    """Prunes the weights with the smallest importance scores, exactly as many as asked for.

        float amount   keeps floor((1 - amount) * n + 1/2) of the n weights that are left
        int amount     prunes so many

    For `prune.global_unstructured` and wherever else torch takes a pruning method. torch's
    L1Unstructured differs in three points: it ranks |score|, which keeps a score of -9; its choice
    among equal scores is not specified; it rounds halves to even.

    Args:
        amount: what to prune of the weights that are not pruned yet.

    Raises:
        TypeError: amount is no real number.
        ValueError: a float outside [0, 1], a negative int.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 1)
        >>> scores = torch.tensor([[2.0, 1.0, 2.0]])
        >>> method = LookaheadUnstructured.apply(layer, "weight", 2, importance_scores=scores)
        >>> layer.weight_mask
        tensor([[1., 0., 0.]])
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        _check_amount(amount)
        self.amount: Any = amount  # any real number

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask of the best scores.

        Args:
            t: importance scores >= 0: the weight's shape, or 1-D, those of all weights that are
                left, of one layer or of many.
            default_mask: ones, shape of t, in the dtype that the mask is to have.

        Returns:
            Ones and zeros like default_mask.

        Raises:
            ValueError: a score is negative or NaN, or is a parameter; amount is more than there is.
        """
        kept = lap_ext.topk_mask(_checked(t), **self._count(t.numel()), check_finite=False)
        return default_mask * kept.to(default_mask)  # dtype and device

    def _count(self, left: int) -> dict[str, Any]:
        """How many of those left to keep, as topk_mask takes it."""
        if not isinstance(self.amount, numbers.Integral):
            return {"sparsity": self.amount}
        if int(self.amount) > left:
            raise ValueError(
                f"LookaheadUnstructured: expected amount <= {left} (the weights that are not "
                f"pruned yet), got {self.amount}."
            )
        return {"keep": left - int(self.amount)}

    @classmethod
    def apply(  # type: ignore[override]  # as torch's own methods have it
        cls, module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Prunes a tensor of a module; everything is checked before the module is changed.

        torch's own `apply` has dropped the hook of an earlier pruning by the time it finds a
        mistake.

        Args:
            module: the module.
            name: attribute of the weight in it.
            amount: what to prune of the weights that are not pruned yet.
            importance_scores: `scores(model, ...)[module, name]`.

        Returns:
            The hook, as torch returns it.
        """
        weight = getattr(module, name)
        if importance_scores is None:
            raise TypeError(
                "LookaheadUnstructured: expected importance_scores (a module does not know its "
                f"neighbors), got none for {name!r} of {type(module).__name__}. Pass "
                "torch_prune.scores(model, example_inputs)[module, name]."
            )
        if importance_scores.shape != weight.shape or importance_scores.device != weight.device:
            raise ValueError(
                f"LookaheadUnstructured: expected importance_scores like {name} of "
                f"{type(module).__name__}, got {list(importance_scores.shape)} on "
                f"{importance_scores.device} and {list(weight.shape)} on {weight.device}."
            )
        mask = getattr(module, f"{name}_mask", None)
        left = importance_scores if mask is None else importance_scores[mask == 1]
        cls(amount)._count(_checked(left).numel())
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)


def lookahead_unstructured(
    module: nn.Module, name: str, amount: float, importance_scores: Tensor
) -> nn.Module:
    """Prunes the weights of one tensor that have the smallest scores; torch's l1_unstructured.

    Args:
        module: the module.
        name: attribute of the weight in it.
        amount: what to prune of the weights that are not pruned yet: a fraction, or an int.
        importance_scores: `scores(model, ...)[module, name]`.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: as `LookaheadUnstructured`; the module was not changed.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = scores(net, torch.ones(1, 4))
        >>> for (module, name), importance in found.items():
        ...     module = lookahead_unstructured(module, name, 0.75, importance)
        >>> int(net[0].weight_mask.sum()), int(net[2].weight_mask.sum())
        (8, 4)
    """
    LookaheadUnstructured.apply(module, name, amount, importance_scores=importance_scores)
    return module


def scores(model: nn.Module, example_inputs: Any, **options: Any) -> dict[Place, Tensor]:
    """Scores of every weight of a model, keyed as torch.nn.utils.prune asks for them.

    A model that torch has pruned already is scored as it computes: the weights that are left are
    their layers' neighbors'.

    Args:
        model: as in `lap_ext.scores`; pruned by torch.nn.utils.prune or not.
        example_inputs: as in `lap_ext.scores`.
        options: criterion, normalize, exclude, bn, skip, data, kwargs, neighbors and unknown, as in
            `lap_ext.scores`.

    Returns:
        (module, attribute) -> scores >= 0 of the weight's shape. A tied weight is listed once.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> [(type(module).__name__, name) for module, name in scores(net, torch.ones(1, 1))]
        [('Linear', 'weight'), ('Linear', 'weight')]
    """
    with _plain(model) as hooks:
        topology = _trace(model, example_inputs, options)
        masks = _torch_masks(hooks, topology)
        found = lap_ext.scores(model, topology, masks=masks, **options)
    result = {}
    for name, importance in found.items():
        path, _, attribute = topology.layers[name].parameter.rpartition(".")
        result[model.get_submodule(path), attribute] = importance
    return result


def global_masks(
    model: nn.Module, example_inputs: Any, sparsity: Any, **options: Any
) -> lap_ext.Masks:
    """The masks of one exact ranking over all layers, for `prune.custom_from_mask`.

    For the same masks `prune.global_unstructured` makes several copies of all weights; here nothing
    is concatenated and no score is sorted.

    Args:
        model: as in `lap_ext.prune`; pruned by torch.nn.utils.prune or not. It is not changed.
        example_inputs: as in `lap_ext.prune`.
        sparsity: as in `lap_ext.prune`: of all weights, also of those that torch has pruned, which
            never return.
        options: criterion, normalize, rounds, exclude, bn, skip, data, kwargs, neighbors and
            unknown, as in `lap_ext.prune`.

    Returns:
        Layer name -> mask.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> masks = global_masks(net, torch.ones(1, 4), 0.75)
        >>> module = prune.custom_from_mask(net[0], "weight", masks["0"])
        >>> masks.kept, masks.total
        (12, 48)
    """
    with _plain(model) as hooks:
        topology = _trace(model, example_inputs, options)
        masks = _torch_masks(hooks, topology)
        found = lap_ext.prune(
            model, topology, sparsity, scope="global", masks=masks, apply=False, **options
        )
    return found.masks


def apply_global_(
    model: nn.Module, example_inputs: Any, sparsity: Any, **options: Any
) -> lap_ext.Masks:
    """Hands the masks of `global_masks` to torch.nn.utils.prune.

    A layer that torch has pruned already gets its new mask into the buffer that it has: pruning in
    many steps takes no more memory than in one.

    Args:
        model: as in `global_masks`.
        example_inputs: as in `global_masks`.
        sparsity: as in `global_masks`.
        options: as in `global_masks`.

    Returns:
        The masks. Their `remove(model)` makes the pruning permanent.

    Raises:
        ValueError: as `lap_ext.prune` and `Masks.to_torch_prune`; nothing was changed.

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
    masks = global_masks(model, example_inputs, sparsity, **options)
    with _plain(model) as hooks:
        names = {id(p): layer_name(name) for name, p in model.named_parameters()}
        pruned = [names[id(module._parameters[hook._tensor_name])] for module, hook in hooks]
    fresh = {name: mask for name, mask in masks.items() if name not in pruned}
    lap_ext.Masks(fresh).to_torch_prune(model)
    for name, (module, hook) in zip(pruned, hooks, strict=True):
        if name in masks:
            getattr(module, f"{hook._tensor_name}_mask").copy_(masks[name])
            setattr(module, hook._tensor_name, hook.apply_mask(module))
    return masks


def _check_amount(amount: Any) -> None:
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise TypeError(
            "LookaheadUnstructured: expected amount to be a float (the fraction of the remaining "
            f"weights to prune) or an int (how many), got {type(amount).__name__}."
        )
    if isinstance(amount, numbers.Integral):
        if int(amount) < 0:
            raise ValueError(f"LookaheadUnstructured: expected amount >= 0, got {amount}.")
    elif not 0 <= float(amount) <= 1:
        raise ValueError(
            "LookaheadUnstructured: expected 0 <= amount <= 1 (the fraction of the remaining "
            f"weights to prune), got {amount}. A number of weights is an int."
        )


def _checked(importance: Tensor) -> Tensor:
    """The scores, if they are some."""
    if importance.requires_grad:
        raise ValueError(
            "LookaheadUnstructured: expected importance scores for every tensor, got parameters "
            "(they require a gradient; torch takes the weight itself where no score is given). "
            "Pass importance_scores=torch_prune.scores(model, example_inputs)."
        )
    if importance.numel():
        lowest = importance.min()  # NaN if there is one
        if not bool(lowest >= 0):
            raise ValueError(
                f"LookaheadUnstructured: expected importance scores >= 0, got {lowest.item()}. "
                "torch takes the weight itself where no score is given; for magnitudes pass abs()."
            )
    return importance.detach()


@contextmanager
def _plain(model: nn.Module) -> Iterator[Hooks]:
    """The model with its weights as plain parameters, what torch has pruned included.

    Gives the hooks of torch's pruning, each with its module; puts all back in the end.
    """
    hooks: Hooks = [
        (module, hook)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    undo = []
    try:
        for module, hook in hooks:
            name = hook._tensor_name
            parameters, calls = module._parameters, module._forward_pre_hooks
            undo.append((module, name, module.__dict__.pop(name), dict(parameters), dict(calls)))
            keys = {f"{name}_orig": name}
            _become(parameters, {keys.get(key, key): p for key, p in parameters.items()})
            _become(calls, {key: call for key, call in calls.items() if call is not hook})
        yield hooks
    finally:
        for module, name, computed, parameters, calls in reversed(undo):
            _become(module._parameters, parameters)
            _become(module._forward_pre_hooks, calls)
            module.__dict__[name] = computed


def _become(store: dict[Any, Any], now: dict[Any, Any]) -> None:
    """The same dict with other entries, in their order: a tied parameter's first name goes by it."""
    store.clear()
    store.update(now)


def _torch_masks(hooks: Hooks, topology: lap_ext.Topology) -> dict[str, Tensor]:
    """Layer name -> what torch's masks leave; of a model that is plain now."""
    names = {id(layer.weight): name for name, layer in topology.layers.items()}
    found: dict[str, Tensor] = {}
    for module, hook in hooks:
        weight = module._parameters[hook._tensor_name]
        if id(weight) in names:
            found[names[id(weight)]] = getattr(module, f"{hook._tensor_name}_mask") != 0
    return found


def _trace(model: nn.Module, example_inputs: Any, options: dict[str, Any]) -> lap_ext.Topology:
    """The topology; the options that are trace's are taken out."""
    named = {
        name: options.pop(name) for name in ("kwargs", "neighbors", "unknown") if name in options
    }
    if isinstance(example_inputs, lap_ext.Topology):
        return example_inputs
    return lap_ext.trace(model, example_inputs, **named)
