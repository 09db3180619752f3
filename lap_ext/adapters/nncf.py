# SPDX-License-Identifier: MIT
"""Writes lookahead masks into models of nncf.prune, for batch norm adaptation and export.

    >>> import lap_ext, nncf, torch
    >>> from lap_ext.adapters.nncf import write_masks_
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.bn = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)
    ...         self.fc = torch.nn.Linear(64, 2)
    ...     def forward(self, x):
    ...         return self.fc(self.bn(self.conv(x)).relu().flatten(1))
    >>> net, x = Net(), torch.randn(8, 1, 6, 6)
    >>> masks = lap_ext.prune(net, x, 0.75, scope="global", apply=False).masks
    >>> mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL  # masks of this kind, replaced below
    >>> net = nncf.prune(net, mode, ratio=0.0, examples_inputs=x)
    >>> write_masks_(net, masks)
    >>> net = nncf.batch_norm_adaptation(net, nncf.Dataset([x]))
    Batch norm adaptation ...
    >>> nncf.pruning_statistic(net).pruning_ratio  # 123 of 164
    0.75

nncf keeps a bool mask for each tensor and multiplies the tensor by its mask in the forward pass.
The parameters stay as they are and get no gradient where they are masked. Everything that uses the
model afterwards sees the masks: training, `nncf.batch_norm_adaptation`, `nncf.pruning_statistic`,
`nncf.quantize`, `nncf.strip` (which needs torchao), `nncf.torch.get_config`, and
`openvino.convert_model`. nncf and OpenVINO send usage statistics unless told not to
(opt_in_out --opt_out).

`nncf.prune(ratio=0.0)` itself prunes the smallest weight of each tensor, and all weights equal to
it. These weights stay pruned in a layer for which no mask is written: leave such a layer out with
nncf's ignored_scope. nncf's own schedulers replace all masks with masks of magnitudes; for a
schedule, call `prune_` instead. nncf adds a module to the model, so the model itself cannot be an
nn.Sequential, which would call that module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

import lap_ext
from lap_ext.allocation import Sparsity
from lap_ext.criteria import CriterionLike
from lap_ext.errors import LapImportError, LapTypeError, LapValueError, calling
from lap_ext.masks import layer_name, parameter_in
from lap_ext.options import (
    BatchNorm,
    Cost,
    Data,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Residual,
    Scope,
    listed,
)
from lap_ext.progress import Progress
from lap_ext.structures import Aggregate, StructureLike

with calling("lap_ext.adapters.nncf"):
    try:
        import nncf
    except ImportError as error:
        raise LapImportError(
            "the nncf package (3 or later)",
            f"none that can be imported ({error})",
            "Run: pip install nncf",
            name="nncf",
        ) from error
    try:
        from nncf.torch.function_hook.pruning.magnitude.algo import get_pruned_modules
        from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE, is_wrapped
    except ImportError as error:
        raise LapImportError(
            "an nncf with nncf.prune (3 or later; made with 3.4.0)",
            f"nncf {nncf.__version__}, where it is missing or elsewhere ({error})",
            "Run: pip install nncf==3.4.0",
            name="nncf",
        ) from error

Buffers: TypeAlias = dict[str, Tensor]  # parameter name -> the mask that nncf has on it

_LISTED = 10  # of many problems, the first ones show what is wrong


@calling("masks")
def masks(model: nn.Module) -> lap_ext.Masks:
    """Copies the masks that nncf currently has on a model's parameters.

    Args:
        model: what `nncf.prune` returned.

    Returns:
        Layer name -> mask, with the layer names that lap_ext uses everywhere.

    Raises:
        ValueError: nncf has no masks on the model.

    Example:
        >>> import nncf, torch
        >>> net = torch.nn.Linear(4, 2)
        >>> mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
        >>> masks(nncf.prune(net, mode, ratio=0.5, examples_inputs=torch.ones(1, 4)))
        Masks(1 layer, 4 of 8 weights kept, sparsity 0.5)
    """
    buffers = _buffers(model)
    return lap_ext.Masks({layer_name(name): m.clone() for name, m in buffers.items()})


@calling("write_masks_")
def write_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Writes masks into the buffers that nncf has on a model.

    Layers without a mask keep the one that nncf has.

    Args:
        model: what `nncf.prune` returned, in a magnitude mode.
        masks: layer name -> bool tensor of the parameter's shape, on any device; True means kept.
            `lap_ext.prune(...).masks` and `lap_ext.Masks.load` give such masks.

    Raises:
        TypeError: a mask is not a dense bool tensor.
        ValueError: nncf has no masks on the model, or there are layers that nncf does not mask,
            that have another shape or that are named twice; the error lists all of them. Nothing
            was changed.

    Example:
        >>> import nncf, torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
        >>> net = nncf.prune(net, mode, ratio=0.0, examples_inputs=torch.ones(1, 2))
        >>> write_masks_(net, {"weight": torch.tensor([[True, False]])})
        >>> bool(net(torch.ones(1, 2)) == net.weight[0, 0])
        True
    """
    buffers = _buffers(model)
    for name, mask in _matched(model, buffers, lap_ext.Masks(masks)).items():
        buffers[name].copy_(mask)


@calling("prune_")
def prune_(
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
    scope: Scope = "layer",
    normalize: Normalize = "auto",
    order: Order = "parallel",
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
) -> lap_ext.PruneResult:
    """Prunes further a model that has nncf's masks, and scores it with these masks applied.

    Weights that the masks already prune never return and do not count in neighbor norms. Call
    this function between epochs with growing sparsities, in place of one of nncf's schedulers.

    Args:
        model: what `nncf.prune` returned, in a magnitude mode.
        example_inputs: as in `lap_ext.prune`.
        sparsity: as in `lap_ext.prune`, for the layers that nncf masks; a fraction counts all their
            weights, including those that are already pruned.
        topology: as in `lap_ext.prune`.
        criterion: as in `lap_ext.prune`.
        structure: as in `lap_ext.prune`.
        aggregate: as in `lap_ext.prune`.
        multiple_of: as in `lap_ext.prune`.
        strict: as in `lap_ext.prune`.
        cost: as in `lap_ext.prune`.
        uniform: as in `lap_ext.prune`.
        scope: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        order: as in `lap_ext.prune`.
        rounds: as in `lap_ext.prune`.
        layers: as in `lap_ext.prune`; those that nncf does not mask stay as they are.
        exclude: as in `lap_ext.prune`.
        min_keep: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        data: as in `lap_ext.prune`.
        neighbors: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        on_progress: as in `lap_ext.prune`.

    Returns:
        The result; its masks are written to the model.

    Raises:
        TopologyError, TypeError, ValueError: as in `lap_ext.prune`; also if nncf has no masks on
            the model. Nothing was changed.

    Example:
        >>> import nncf, torch
        >>> net, x = torch.nn.Linear(8, 6), torch.ones(1, 8)
        >>> mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
        >>> net = nncf.prune(net, mode, ratio=0.0, examples_inputs=x)
        >>> for sparsity in (0.5, 0.75):  # train in between
        ...     result = prune_(net, x, sparsity)
        >>> result.masks == masks(net), result.kept
        (True, 12)
    """
    buffers = _buffers(model)
    with _plain(model):
        if topology is None:
            topology = lap_ext.trace(
                model, example_inputs, neighbors=neighbors, on_unsupported=on_unsupported
            )
            example_inputs = neighbors = None
        names = {layer.parameter: name for name, layer in topology.layers.items()}
        earlier = {names[name]: mask for name, mask in buffers.items() if name in names}
        unmasked = [name for name in topology.layers if name not in earlier]
        result = lap_ext.prune(
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
            scope=scope,
            normalize=normalize,
            order=order,
            rounds=rounds,
            layers=list(earlier) if layers is None else layers,
            min_keep=min_keep,
            exclude=[*unmasked, *listed(exclude)],
            batch_norm=batch_norm,
            residual=residual,
            data=data,
            neighbors=neighbors,
            masks=earlier,
            apply=False,
            on_progress=on_progress,
        )
    write_masks_(model, result.masks)
    return result


def _buffers(model: nn.Module) -> Buffers:
    """Returns nncf's own masks, not copies, of the parameters of a model."""
    if not isinstance(model, nn.Module):
        raise LapTypeError(
            "{argument} to be a torch.nn.Module", type(model).__name__, argument="model"
        )
    parameters = dict(model.named_parameters())
    hooks = get_pruned_modules(model) if is_wrapped(model) else {}
    buffers = {name: hook.binary_mask for name, hook in hooks.items() if name in parameters}
    if not buffers:
        raise LapValueError(
            "a model with nncf's masks on its parameters",
            "none",
            "Call nncf.prune(model, nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.0, "
            "examples_inputs=...) first, and pass what it returns.",
        )
    return buffers


def _matched(model: nn.Module, buffers: Buffers, masks: lap_ext.Masks) -> dict[str, Tensor]:
    """Maps nncf's names of parameters to masks, or raises one error that lists all problems."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    first = {id(weights[name]): name for name in buffers}  # a tied one has several names
    matched: dict[str, Tensor] = {}
    problems: list[str] = []
    for layer, mask in masks.items():
        parameter = parameter_in(layer, weights)
        weight = None if parameter is None else weights[parameter]
        name = first.get(id(weight))
        if weight is None:
            problems.append(f"{layer!r}: the model has no such parameter")
        elif name is None:
            problems.append(f"{layer!r}: nncf has no mask on it (ignored_scope, or no such kind)")
        elif name in matched:
            problems.append(f"{layer!r}: the same parameter as another one (tied)")
        elif mask.shape != weight.shape:
            problems.append(f"{layer!r}: mask {list(mask.shape)}, parameter {list(weight.shape)}")
        else:
            matched[name] = mask
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:_LISTED])
        raise LapValueError(
            "masks that fit what nncf masks", f"{len(problems)} that do not:{listed}"
        )
    return matched


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Removes nncf's hooks, which cannot be traced, from a model; restores them at the end."""
    wrapped = model.__dict__["forward"]
    modules = dict(model._modules)
    model.__dict__["forward"] = wrapped.orig_forward
    del model._modules[ATR_HOOK_STORAGE]
    try:
        yield
    finally:
        model.__dict__["forward"] = wrapped
        model._modules.clear()
        model._modules.update(modules)
