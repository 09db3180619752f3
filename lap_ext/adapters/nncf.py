# SPDX-License-Identifier: MIT
"""Lookahead masks in models that nncf.prune has prepared: batch norm adaptation and export follow.

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
    >>> mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL  # masks of this kind; ours replace them
    >>> net = nncf.prune(net, mode, ratio=0.0, examples_inputs=x)
    >>> write_masks_(net, masks)
    >>> net = nncf.batch_norm_adaptation(net, nncf.Dataset([x]))
    Batch norm adaptation ...
    >>> nncf.pruning_statistic(net).pruning_ratio  # 123 of 164
    0.75

nncf keeps a bool mask for each tensor and multiplies by it in the forward pass; the parameters stay
as they are, and get no gradient where they are masked. What reads the model afterwards sees the
masks: training, `nncf.batch_norm_adaptation`, `nncf.pruning_statistic`, `nncf.quantize`,
`nncf.strip` (which needs torchao), `nncf.torch.get_config`, and `openvino.convert_model`. nncf and
OpenVINO send statistics of use unless told not to (opt_in_out --opt_out).

`nncf.prune(ratio=0.0)` itself prunes the smallest weight of each tensor, or all that are equal to
it. That stays in a layer for which no mask is written: leave it out with nncf's ignored_scope.
nncf's own schedulers replace all masks by magnitudes: for a schedule call `prune_` instead. It adds
a module to the model, so the model itself cannot be an nn.Sequential, which would call it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

import lap_ext
from lap_ext.masks import layer_name, parameter_in

try:
    import nncf
except ImportError as error:
    raise ModuleNotFoundError(
        "lap_ext.adapters.nncf: expected the nncf package (3 or later), got none that can be "
        f"imported ({error}). Run: pip install nncf",
        name="nncf",
    ) from error
try:
    from nncf.torch.function_hook.pruning.magnitude.algo import get_pruned_modules
    from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE, is_wrapped
except ImportError as error:
    raise ImportError(
        "lap_ext.adapters.nncf: expected an nncf with nncf.prune (3 or later; made with 3.4.0), got "
        f"nncf {nncf.__version__}, where it is missing or elsewhere ({error}). Run: pip install "
        "nncf==3.4.0"
    ) from error

Buffers: TypeAlias = dict[str, Tensor]  # parameter name -> the mask that nncf has on it


def masks(model: nn.Module) -> lap_ext.Masks:
    """The masks that nncf has on a model's parameters now.

    Args:
        model: what `nncf.prune` returned.

    Returns:
        Layer name -> mask, copies, named as everywhere in lap_ext.

    Raises:
        ValueError: nncf has no masks on the model.

    Example:
        >>> import nncf, torch
        >>> net = torch.nn.Linear(4, 2)
        >>> mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
        >>> masks(nncf.prune(net, mode, ratio=0.5, examples_inputs=torch.ones(1, 4)))
        Masks(1 layer, 4 of 8 weights kept, sparsity 0.5)
    """
    found = _buffers("masks", model)
    return lap_ext.Masks({layer_name(name): m.clone() for name, m in found.items()})


def write_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Puts masks into the buffers that nncf has on a model.

    Layers without a mask keep the one that nncf has.

    Args:
        model: what `nncf.prune` returned, in a magnitude mode.
        masks: layer name -> bool tensor of the parameter's shape, True: kept; on any device. What
            `lap_ext.prune(...).masks` and `lap_ext.Masks.load` give.

    Raises:
        TypeError: a mask is not a dense bool tensor.
        ValueError: nncf has no masks on the model; layers that it does not mask, of another shape,
            or named twice, all listed. Nothing was changed.

    Example:
        >>> import nncf, torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
        >>> net = nncf.prune(net, mode, ratio=0.0, examples_inputs=torch.ones(1, 2))
        >>> write_masks_(net, {"weight": torch.tensor([[True, False]])})
        >>> bool(net(torch.ones(1, 2)) == net.weight[0, 0])
        True
    """
    buffers = _buffers("write_masks_", model)
    for name, mask in _matched(model, buffers, lap_ext.Masks(masks)).items():
        buffers[name].copy_(mask)


def prune_(
    model: nn.Module, example_inputs: Any, sparsity: Any, **options: Any
) -> lap_ext.PruneResult:
    """Prunes a model that nncf has masks on further, scored as it computes.

    What the masks prune already never returns, and does not count as a neighbor. Call it between
    epochs with growing sparsities in place of one of nncf's schedulers.

    Args:
        model: what `nncf.prune` returned, in a magnitude mode.
        example_inputs: as in `lap_ext.prune`.
        sparsity: as in `lap_ext.prune`, of the layers that nncf masks: of all of their weights,
            those that are pruned already included.
        options: as in `lap_ext.prune`, but for masks and apply.

    Returns:
        The result; its masks are written.

    Raises:
        TypeError: masks or apply among the options.
        ValueError: nncf has no masks on the model, or as `lap_ext.prune`. Nothing was changed.

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
    for name in ("masks", "apply"):
        if name in options:
            raise TypeError(
                f"prune_: expected no {name} (the masks are nncf's, and are written), got one. Leave "
                "it out."
            )
    buffers = _buffers("prune_", model)
    named = {key: options.pop(key) for key in ("kwargs", "neighbors", "unknown") if key in options}
    exclude = options.pop("exclude", ())
    with _plain(model):
        topology = example_inputs
        if not isinstance(topology, lap_ext.Topology):
            topology = lap_ext.trace(model, example_inputs, **named)
        places = {layer.parameter: name for name, layer in topology.layers.items()}
        given = {places[name]: mask for name, mask in buffers.items() if name in places}
        others = [name for name in topology.layers if name not in given]
        result = lap_ext.prune(
            model, topology, sparsity, masks=given, apply=False,
            exclude=[*others, *([exclude] if isinstance(exclude, str) else exclude)], **options,
        )  # fmt: skip
    write_masks_(model, result.masks)
    return result


def _buffers(function: str, model: nn.Module) -> Buffers:
    """The masks of nncf on the parameters of a model, themselves."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: expected model to be a torch.nn.Module, got {type(model).__name__}."
        )
    parameters = dict(model.named_parameters())
    found = get_pruned_modules(model) if is_wrapped(model) else {}
    buffers = {name: hook.binary_mask for name, hook in found.items() if name in parameters}
    if not buffers:
        raise ValueError(
            f"{function}: expected a model with nncf's masks on its parameters, got none. Call "
            "nncf.prune(model, nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.0, "
            "examples_inputs=...) first, and pass what it returns."
        )
    return buffers


def _matched(model: nn.Module, buffers: Buffers, masks: lap_ext.Masks) -> dict[str, Tensor]:
    """The name that nncf has for a parameter -> its mask; or one ValueError with all that is wrong."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    first = {id(weights[name]): name for name in buffers}  # a tied one has several names
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for layer, mask in masks.items():
        parameter = parameter_in(layer, weights)
        weight = None if parameter is None else weights[parameter]
        name = first.get(id(weight))
        if weight is None:
            problems.append(f"{layer!r}: the model has no such parameter")
        elif name is None:
            problems.append(f"{layer!r}: nncf has no mask on it (ignored_scope, or no such kind)")
        elif name in found:
            problems.append(f"{layer!r}: the same parameter as another one (tied)")
        elif mask.shape != weight.shape:
            problems.append(f"{layer!r}: mask {list(mask.shape)}, parameter {list(weight.shape)}")
        else:
            found[name] = mask
    if problems:
        raise ValueError(
            f"write_masks_: expected masks that fit what nncf masks, got {len(problems)} that do "
            "not:\n  " + "\n  ".join(problems[:10])
        )
    return found


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """The model without nncf's hooks, as lap_ext can trace it; puts them back in the end."""
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
