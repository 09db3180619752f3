# SPDX-License-Identifier: MIT
"""Applies, keeps and saves the masks of a model's layers, or hands them to torch.nn.utils.prune.

A mask is a bool tensor with its parameter's shape; True marks a kept weight. The model gets no
wrapper and no parametrization, and its state_dict keeps the same keys, but for a weight that its
module computes itself (torch.nn.utils.parametrize, weight and spectral norm): there the mask is
registered as the last step of the computation (lap_ext/computed). Every function checks all layers
before it changes the first; targets.py resolves the names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

from lap_ext.errors import LapTypeError, LapValueError, calling, in_layer
from lap_ext.masks import file
from lap_ext.masks.keep import KeepHandle, check_hooks
from lap_ext.masks.targets import Target, find, find_pruned, owners, revived, zero_
from lap_ext.ops.memory import is_plain
from lap_ext.structures import StructureLike, spelled


class Masks(Mapping[str, Tensor]):
    """Masks of a model's layers: a mapping from layer names to bool tensors of the weights' shapes.

    A layer has the name of its parameter without ".weight" ("conv1"); a parameter that is not
    called weight keeps its full name ("attn.in_proj_weight"). A tied parameter is one layer and may
    be given under any of its names; so are two parameters over the same memory, as after
    `head.weight.data = embedding.weight.data`. Prefixes that DataParallel, DistributedDataParallel,
    torch.compile and AveragedModel add to names are ignored.

    Args:
        masks: a bool tensor for each layer name, in which True marks a kept weight. The tensors
            are not copied.
        structure: what was removed together, as in `lap_ext.prune`; saved with the masks, but not
            checked against them. None is that of masks, if these are `Masks`, and else none.

    Raises:
        TypeError: a mask is not a dense bool tensor, or a name is not a string.
        ValueError: a mask is on the meta device, or there is no such structure.

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

    _structure: str | None = None

    @calling("Masks")
    def __init__(self, masks: Mapping[str, Tensor], structure: StructureLike | None = None) -> None:
        if not isinstance(masks, Mapping):
            raise LapTypeError("a mapping of layer name -> bool tensor", type(masks).__name__)
        for name, mask in masks.items():
            _check_mask(name, mask)
        self._masks: Mapping[str, Tensor] = dict(masks)
        if structure is not None:
            self._structure = spelled(structure)
        elif isinstance(masks, Masks):
            self._structure = masks.structure

    @classmethod
    def reading(cls, masks: Mapping[str, Tensor], structure: StructureLike | None = None) -> Masks:
        """Makes masks of a mapping that reads each mask from a file whenever it is asked for."""
        stored = cls({}, structure)
        stored._masks = masks
        return stored

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same layers, in any order, and keep the same weights.

        What was removed together does not matter.
        """
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(mask, other[name].to(mask.device)) for name, mask in self.items()
        )

    __hash__ = None  # type: ignore[assignment]  # the tensors can change

    def __repr__(self) -> str:
        layers = f"{len(self)} layer{'' if len(self) == 1 else 's'}"
        structure = f", structure {self.structure}" if self.structure else ""
        return (
            f"Masks({layers}, {self.kept} of {self.total} weights kept, "
            f"sparsity {self.sparsity:.4g}{structure})"
        )

    @property
    def structure(self) -> str | None:
        """What was removed together: "2:4", "16x16", "row", "groups"; None for single weights.

        Example:
            >>> import torch, lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2))
            >>> lap_ext.prune(net, torch.ones(1, 8), structure="2:4").masks
            Masks(1 layer, 8 of 16 weights kept, sparsity 0.5, structure 2:4)
            >>> lap_ext.prune(net, torch.ones(1, 8), 0.5, structure="row").masks.structure
            'row'
        """
        return self._structure

    @property
    def kept(self) -> int:
        """Counts exactly the kept weights of all layers."""
        return sum(kept for kept, _ in self.counts().values())

    @property
    def total(self) -> int:
        """Counts the weights of all layers."""
        return sum(mask.numel() for mask in self.values())

    @property
    def sparsity(self) -> float:
        """The fraction of all layers' weights that is removed; 0.0 if there are no weights."""
        total = self.total
        return (total - self.kept) / total if total else 0.0

    def counts(self) -> dict[str, tuple[int, int]]:
        """Counts exactly the kept weights and all weights of each layer: (kept, total).

        Example:
            >>> import torch, lap_ext
            >>> lap_ext.Masks({"fc": torch.tensor([[True, False, True]])}).counts()
            {'fc': (2, 3)}
        """
        return {name: (int(m.count_nonzero()), m.numel()) for name, m in self.items()}

    def to(self, device: torch.device | str | int) -> Masks:
        """Moves the masks to a device; masks that are already there are not copied."""
        return Masks({name: mask.to(device) for name, mask in self.items()}, self.structure)

    @calling("Masks.apply")
    def apply(self, model: Module) -> None:
        """Sets the weights that are not kept to +0.0, in place; autograd sees the change.

        A weight that its module computes (with torch.nn.utils.parametrize, weight_norm or
        spectral_norm) is multiplied by its mask from now on, whenever it is computed. That mask is
        a buffer of the model: apply the masks to another copy of the model before you load the
        state of this one there. A second call can only prune more.

        Args:
            model: the model that the masks were made for, or a copy of it. An average of the
                weights (AveragedModel) that began before the pruning needs one such call; after it,
                averages of zeros stay zero.

        Raises:
            ValueError: the model lacks some of the layers, or they have another shape, are on
                another device or are not writable. The message lists all of them; nothing was
                changed.

        Example:
            >>> import torch, lap_ext
            >>> layer = torch.nn.Linear(2, 1)
            >>> lap_ext.Masks({"weight": torch.tensor([[False, True]])}).apply(layer)
            >>> layer.weight[0, 0].item()
            0.0
            >>> normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1))
            >>> lap_ext.Masks({"weight": torch.tensor([[False, True]])}).apply(normed)
            >>> normed.weight[0, 0].item()
            0.0
        """
        for target in find(model, self):
            target.prune()

    @calling("Masks.check")
    def check(self, model: Module) -> dict[str, int]:
        """Counts the pruned weights that are not zero, such as those that training has revived.

        A weight counts unless it is +0.0 or -0.0; NaN counts. Nothing is changed: `apply` sets
        these weights to zero again.

        Args:
            model: the model that the masks were made for, or a copy of it, on any device.

        Returns:
            Layer name -> the number of its pruned weights that are not zero, without the layers
            that have none. An empty dict: every pruned weight is zero.

        Raises:
            ValueError: the model lacks some of the layers, they have another shape, or a weight is
                on the meta device.

        Example:
            >>> import torch, lap_ext
            >>> layer = torch.nn.Linear(3, 1)
            >>> masks = lap_ext.Masks({"weight": torch.tensor([[False, True, False]])})
            >>> masks.check(layer)
            {'weight': 2}
            >>> masks.apply(layer)
            >>> masks.check(layer)
            {}
        """
        counts = {}
        for target in find(model, self, write=False):
            with in_layer(target.name):
                counts[target.name] = revived(target.weight, target.mask)
        return {name: count for name, count in counts.items() if count}

    @calling("Masks.keep")
    def keep(self, model: Module, optimizer: Optimizer | Sequence[Optimizer]) -> KeepHandle:
        """Applies the masks and keeps pruned weights at zero while the optimizer trains the model.

        In every backward pass, the gradients of pruned weights are set to 0; after each step, the
        pruned weights are set to +0.0. The optimizer's state for them is set to 0 at once, and
        again after optimizer.load_state_dict. The kept weights thus train as if the pruned ones did
        not exist. For optimizers that treat each weight separately, the result is bit for bit the
        same as with a forward pass that multiplies the weight by the mask. Gradient accumulation,
        gradient clipping, GradScaler, fused and foreach variants, DistributedDataParallel (with the
        same masks in each process) and torch.compile work without further calls, and so do
        optimizers that step by methods of their own: with SAM's first_step and second_step,
        e(w) = rho * g / ||g|| is 0 for pruned weights, and its inner optimizer is kept too.

        With LBFGS, gradients are masked at every evaluation of the closure, so pruned weights do
        not move within a step either; a history from before the pruning is dropped.

        What else writes weights between two steps (model.load_state_dict, an average that is copied
        back, an optimizer that is not kept) may revive pruned ones. The next step sets them to zero
        again and warns once, with the layers' names; to train without them from the start, call
        apply() after such a write. Only what torch does not count as a write (weight.data.add_) by
        methods that run no step hook is not seen there; `check` sees everything.

        A weight that its module computes is masked there, as by `apply`, and needs no hooks.
        Parameters that this optimizer does not train are masked once, but not kept masked. A copy
        of the optimizer has no hooks, so call keep for it too. The optimizer's state of a
        0-dimensional parameter is not cleared, because it looks the same as a step count.

        Args:
            model: the model that the masks were made for.
            optimizer: any torch.optim.Optimizer of the model's parameters, or a list of several.

        Returns:
            A handle, whose remove() removes the hooks, as does the end of a `with` block. Several
            `Masks` may be kept at once; a weight that any of them prunes stays zero.

        Raises:
            ValueError: as for `apply`, or the optimizer has none of the parameters; nothing was
                changed.
            TypeError: optimizer is not a torch optimizer. Later, optimizer.step() raises it if a
                gradient is sparse.
            RuntimeError: raised later by optimizer.step(), before anything changes: the model has
                another parameter in place of a masked one (an assignment, or load_state_dict with
                assign=True), or the optimizer no longer has one that it trained.

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
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        for each in optimizers:
            check_hooks(each)
        targets = find(model, self)
        handle = KeepHandle(model, [x for x in targets if not x.computed], optimizers)
        for target in targets:
            if target.computed:  # the module keeps the mask
                target.prune()
        return handle

    @calling("Masks.save")
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the masks to a safetensors file, one bit per weight.

        The write is atomic: a new file is written beside path and then renamed, so an old file
        stays intact until then; what a killed process has left of it is removed by the next save.
        The same masks give the same bytes. A checksum of each layer is saved with it, so that a
        damaged file is an error when it is read.

        Raises:
            OSError: path is a directory, a pipe or a device, its directory is not there, or the
                disk is full.
            ValueError: a name that the file cannot hold.

        Example:
            >>> import tempfile, torch, lap_ext
            >>> masks = lap_ext.Masks({"fc": torch.tensor([[True, False, True]])})
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     masks.save(f"{directory}/masks.safetensors")
            ...     lap_ext.Masks.load(f"{directory}/masks.safetensors") == masks
            True
        """
        file.save(path, self, self.structure)

    @classmethod
    @calling("Masks.load")
    def load(cls, path: str | os.PathLike[str], model: Module | None = None) -> Masks:
        """Reads the masks that `save` wrote; this needs the safetensors package.

        Args:
            path: the file.
            model: a model that must have every layer with the same shape; each mask is put on the
                device of its parameter. With None, nothing is compared and the masks are on the
                CPU.

        Raises:
            OSError: there is no such file, or it is a directory.
            ValueError: the file is damaged or does not contain masks, or some layers do not fit the
                model; the message lists all of those.
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
        masks = cls(*file.load(path))
        if model is None:
            return masks
        targets = find(model, masks, write=False)
        return cls(
            {t.name: t.mask if t.weight.is_meta else t.mask.to(t.weight.device) for t in targets},
            masks.structure,
        )

    @calling("Masks.to_torch_prune")
    def to_torch_prune(self, model: Module) -> None:
        """Hands the masks to torch.nn.utils.prune, which then computes each weight as orig * mask.

        The parameter is renamed to "<name>_orig", the mask becomes a buffer "<name>_mask", and tied
        parameters are masked wherever they are used. The Parameter objects and their order stay the
        same, so an optimizer can go on; the keys of state_dict change. `remove` undoes all this.

        Raises:
            ValueError: as for `apply`, or a layer's module is never called itself, as with
                MultiheadAttention.out_proj and ParameterList; torch recomputes the weight in that
                call. Nothing was changed.

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
        _check_stored(targets)
        owned = [x for target in targets for x in owners(model, target)]
        _check_called(owned)
        for x in owned:
            order = list(x.owner._parameters)
            torch_prune.custom_from_mask(x.owner, x.attribute, x.mask)
            _reorder(x, order, x.attribute, f"{x.attribute}_orig")

    @calling("Masks.remove")
    def remove(self, model: Module) -> None:
        """Undoes `to_torch_prune`: parameters are plain again, with pruned weights set to +0.0.

        Raises:
            ValueError: some layers are not pruned with torch.nn.utils.prune or have another shape.
                The message lists all of them; nothing was changed.

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
                x.weight.data = target.weight.data  # torch parts those tied by memory alone
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


def _check_stored(targets: list[Target]) -> None:
    """Raises where a module computes its tensor: torch cannot rename it."""
    for target in targets:
        if target.computed:
            raise LapValueError(
                "layers whose weight is a parameter",
                f"{target.name!r}, which {type(target.owner).__name__} computes",
                "Use Masks.apply, which registers the mask where it is computed.",
            )


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
