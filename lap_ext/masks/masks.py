# SPDX-License-Identifier: MIT
"""Masks of a model's layers: applied, kept in training, saved, handed to torch.nn.utils.prune.

A mask is a bool tensor of its parameter's shape, True: kept. The model stays the user's model: no
wrapper, no parametrization, the same keys in state_dict. Every function checks all layers before it
changes the first; the names are resolved in targets.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

from lap_ext.errors import LapTypeError, LapValueError, calling
from lap_ext.masks import file
from lap_ext.masks.keep import KeepHandle, check_hooks
from lap_ext.masks.targets import Target, find, find_pruned, is_plain, owners, zero_


class Masks(Mapping[str, Tensor]):
    """Which weights of a model are kept: layer name -> bool tensor of the parameter's shape.

    A layer is named after its parameter without ".weight" ("conv1"); a parameter that is not called
    weight keeps its full name ("attn.in_proj_weight"). A tied parameter is one layer, under any of
    its names. Prefixes that DataParallel, DistributedDataParallel, torch.compile and AveragedModel
    add to names are ignored.

    Args:
        masks: layer name -> bool tensor, True: kept. The tensors are taken as they are, not copied.

    Raises:
        TypeError: a mask is not a dense bool tensor, or a name not a string.
        ValueError: a mask is on the meta device.

    Example:
        >>> import torch, lap_ext
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> masks = lap_ext.Masks({"0": model[0].weight > 0, "2": torch.tensor([[True, False]])})
        >>> masks.apply(model)
        >>> bool(((model[0].weight != 0) == masks["0"]).all()), model[2].weight[0, 1].item()
        (True, 0.0)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with masks.keep(model, optimizer):
        ...     for _ in range(3):
        ...         model(torch.ones(1, 3)).sum().backward()
        ...         optimizer.step()
        >>> model[2].weight[0, 1].item()
        0.0
        >>> lap_ext.Masks({"2": masks["2"]})
        Masks(1 layer, 1 of 2 weights kept, sparsity 0.5)
    """

    @calling("Masks")
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        if not isinstance(masks, Mapping):
            raise LapTypeError("a mapping of layer name -> bool tensor", type(masks).__name__)
        for name, mask in masks.items():
            _check_mask(name, mask)
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same layers, in any order, and keep the same weights."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(mask, other[name].to(mask.device)) for name, mask in self.items()
        )

    __hash__ = None  # type: ignore[assignment]  # the tensors can change

    def __repr__(self) -> str:
        layers = f"{len(self)} layer{'' if len(self) == 1 else 's'}"
        return (
            f"Masks({layers}, {self.kept} of {self.total} weights kept, "
            f"sparsity {self.sparsity:.4g})"
        )

    @property
    def kept(self) -> int:
        """Counts the weights kept in all layers, exactly."""
        return sum(kept for kept, _ in self.counts().values())

    @property
    def total(self) -> int:
        """Counts the weights of all layers."""
        return sum(mask.numel() for mask in self.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the weights of all layers that is removed; 0.0 where there are none."""
        total = self.total
        return (total - self.kept) / total if total else 0.0

    def counts(self) -> dict[str, tuple[int, int]]:
        """Counts (kept, total) of each layer, exactly.

        Example:
            >>> import torch, lap_ext
            >>> lap_ext.Masks({"fc": torch.tensor([[True, False, True]])}).counts()
            {'fc': (2, 3)}
        """
        return {name: (int(m.count_nonzero()), m.numel()) for name, m in self.items()}

    def to(self, device: torch.device | str | int) -> Masks:
        """Moves the masks to a device; those that are there already are not copied."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    @calling("Masks.apply")
    def apply(self, model: Module) -> None:
        """Sets the weights that are not kept to +0.0, in place; autograd sees the change.

        Args:
            model: the model that the masks were made for, or a copy: an average of the weights
                (AveragedModel) that began before the pruning needs it once, later averages of
                zeros are zero.

        Raises:
            ValueError: layers that the model does not have, of another shape, on another device or
                not writable, all listed; nothing was changed.

        Example:
            >>> import torch, lap_ext
            >>> layer = torch.nn.Linear(2, 1)
            >>> lap_ext.Masks({"weight": torch.tensor([[False, True]])}).apply(layer)
            >>> layer.weight[0, 0].item()
            0.0
        """
        for target in find(model, self):
            zero_(target.weight, target.mask)

    @calling("Masks.keep")
    def keep(self, model: Module, optimizer: Optimizer) -> KeepHandle:
        """Applies the masks and keeps pruned weights at zero while the optimizer trains the model.

        Before each step, the gradients of pruned weights are set to 0; after it, the weights are
        set to +0.0. The optimizer's state for them is set to 0 at once, and again after its
        load_state_dict. So the kept weights train as if the pruned ones did not exist: for
        optimizers that treat each weight separately, the result is bit for bit that of a forward
        pass that multiplies the weight by the mask. Gradient accumulation, GradScaler, fused and
        foreach variants, DistributedDataParallel (the same masks on each process) and torch.compile
        work without further calls.

        LBFGS: gradients are masked at every evaluation of the closure, so pruned weights do not
        move within a step either; a history from before the pruning is dropped.

        Two cases are yours to handle: call apply() after model.load_state_dict(), and call the
        handle's mask_gradients() before clip_grad_norm_(), otherwise pruned weights count in the
        norm. Parameters that this optimizer does not train are masked once, but not kept masked. A
        copy of the optimizer has no hooks: call keep for it too. The optimizer's state of a
        0-dimensional parameter is not cleared, because it cannot be told from a step count.

        Args:
            model: the model that the masks were made for.
            optimizer: any torch.optim.Optimizer of its parameters; with several optimizers, call
                keep once for each.

        Returns:
            A handle: its remove(), or the end of a `with` block, removes the hooks. Several `Masks`
            may be kept at once; a weight that any of them prunes stays zero.

        Raises:
            ValueError: as `apply`, or the optimizer has none of the parameters; nothing was
                changed.
            TypeError: optimizer is not a torch optimizer; or, raised by optimizer.step(), a
                gradient is sparse.

        Example:
            >>> import torch, lap_ext
            >>> layer = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
            >>> masks = lap_ext.Masks({"weight": torch.tensor([[False, True]])})
            >>> handle = masks.keep(layer, optimizer)
            >>> layer(torch.ones(2)).sum().backward()
            >>> optimizer.step()
            >>> layer.weight[0, 0].item()
            0.0
            >>> handle.remove()
        """
        check_hooks(optimizer)
        targets = find(model, self)
        handle = KeepHandle(targets, optimizer)
        for target in targets:
            zero_(target.weight, target.mask)
        return handle

    @calling("Masks.save")
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the masks to a safetensors file, one bit per weight.

        The write is atomic: the file is written beside path and renamed, so an old file stays until
        then. The same masks give the same bytes.

        Example:
            >>> import tempfile, torch, lap_ext
            >>> masks = lap_ext.Masks({"fc": torch.tensor([[True, False, True]])})
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     masks.save(f"{directory}/masks.safetensors")
            ...     lap_ext.Masks.load(f"{directory}/masks.safetensors") == masks
            True
        """
        file.save(path, self)

    @classmethod
    @calling("Masks.load")
    def load(cls, path: str | os.PathLike[str], model: Module | None = None) -> Masks:
        """Reads what `save` wrote. Needs the safetensors package.

        Args:
            path: the file.
            model: must have every layer, of the same shape; each mask is then put on the device of
                its parameter. None: no check, on the CPU.

        Raises:
            ValueError: the file is damaged or of something else; layers that do not fit the model,
                all listed.
            ModuleNotFoundError: safetensors is not installed.

        Example:
            >>> import tempfile, torch, lap_ext
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1))
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     path = f"{directory}/masks"
            ...     lap_ext.Masks({"0": torch.tensor([[True, False, True]])}).save(path)
            ...     lap_ext.Masks.load(path, model).apply(model)
            >>> model[0].weight[0, 1].item()
            0.0
        """
        masks = cls(file.load(path))
        if model is None:
            return masks
        targets = find(model, masks, write=False)
        return cls(
            {t.name: t.mask if t.weight.is_meta else t.mask.to(t.weight.device) for t in targets}
        )

    @calling("Masks.to_torch_prune")
    def to_torch_prune(self, model: Module) -> None:
        """Hands the masks to torch.nn.utils.prune: each weight is then computed as orig * mask.

        The parameter is renamed to "<name>_orig", the mask becomes a buffer "<name>_mask", and tied
        parameters are masked wherever they are used. The same Parameter objects stay, in the same
        order, so an optimizer goes on; the keys of state_dict change. `remove` undoes it.

        Raises:
            ValueError: as `apply`; a module that is never called itself, for torch recomputes the
                weight in that call (MultiheadAttention.out_proj, ParameterList). Nothing was
                changed.

        Example:
            >>> import torch, lap_ext
            >>> layer = torch.nn.Linear(2, 1)
            >>> masks = lap_ext.Masks({"weight": torch.tensor([[False, True]])})
            >>> masks.to_torch_prune(layer)
            >>> [name for name, _ in layer.named_parameters()]
            ['weight_orig', 'bias']
            >>> torch.nn.utils.prune.is_pruned(layer)
            True
            >>> masks.remove(layer)
            >>> [name for name, _ in layer.named_parameters()]
            ['weight', 'bias']
        """
        targets = find(model, self)
        owned = [x for target in targets for x in owners(model, target)]
        _check_called(owned)
        for x in owned:
            order = list(x.owner._parameters)
            torch_prune.custom_from_mask(x.owner, x.attribute, x.mask)
            _reorder(x, order, x.attribute, f"{x.attribute}_orig")

    @calling("Masks.remove")
    def remove(self, model: Module) -> None:
        """Undoes `to_torch_prune`: plain parameters again, pruned weights +0.0 for good.

        Raises:
            ValueError: layers that are not pruned with torch.nn.utils.prune, or of another shape,
                all listed; nothing was changed.

        Example:
            >>> import torch, lap_ext
            >>> layer = torch.nn.Linear(2, 1)
            >>> masks = lap_ext.Masks({"weight": torch.tensor([[False, True]])})
            >>> masks.to_torch_prune(layer)
            >>> masks.remove(layer)
            >>> layer.weight[0, 0].item()
            0.0
        """
        for target, owned in find_pruned(model, self):
            for x in owned:
                order = list(x.owner._parameters)
                torch_prune.remove(x.owner, x.attribute)
                _reorder(x, order, f"{x.attribute}_orig", x.attribute)
            zero_(target.weight, target.mask.to(target.weight.device))


def _check_mask(name: object, mask: object) -> None:
    if not isinstance(name, str):
        raise LapTypeError("layer names to be strings", repr(name))
    if not isinstance(mask, Tensor):
        cure = "Use torch.from_numpy." if type(mask).__name__ == "ndarray" else ""
        raise LapTypeError(f"{name!r} to be a bool tensor", type(mask).__name__, cure)
    if mask.dtype != torch.bool:
        raise LapTypeError(
            "a bool mask (True: kept)", f"{mask.dtype} for {name!r}", "Pass mask != 0."
        )
    if not is_plain(mask):
        raise LapTypeError(
            "a plain dense mask", f"{type(mask).__name__} with layout {mask.layout} for {name!r}"
        )
    if mask.is_meta:
        raise LapValueError("masks with data", f"a meta tensor for {name!r}")


def _check_called(targets: list[Target]) -> None:
    """Raises unless the modules' own forward is called: there torch recomputes the weight."""
    for target in targets:
        kind = type(target.owner)
        inner = issubclass(kind, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
        if inner or kind.forward is Module.forward:
            raise LapValueError(
                "layers whose module is called in the forward pass "
                "(there torch recomputes the weight)",
                f"{target.name!r}, in {kind.__name__}",
                "Leave it out, or use Masks.keep.",
            )


def _reorder(target: Target, order: list[str], old: str, new: str) -> None:
    """Restores the order of the parameters, which is visible: torch appends a renamed one."""
    parameters = target.owner._parameters
    moved = {name: parameters[name] for name in (new if n == old else n for n in order)}
    parameters.clear()
    parameters.update(moved)
