# SPDX-License-Identifier: MIT
"""Prunes with llm-compressor through a modifier for oneshot that needs no data.

    >>> import tempfile, transformers
    >>> from llmcompressor import oneshot
    >>> from lap_ext.adapters.llmcompressor import LookaheadModifier
    >>> ids = dict(vocab_size=16, bos_token_id=1, eos_token_id=2)
    >>> sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, head_dim=4)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=1)
    >>> config = transformers.LlamaConfig(**ids, **sizes, **heads)
    >>> directory = tempfile.TemporaryDirectory()  # your model's
    >>> transformers.LlamaForCausalLM(config).save_pretrained(directory.name)
    >>> modifier = LookaheadModifier(sparsity=0.75, ignore=["lm_head"])
    >>> model = oneshot(directory.name, recipe=modifier)  # output_dir=... writes it
    >>> modifier.masks.counts()["model.layers.0.mlp.up_proj"]
    (24, 96)
    >>> int(model.model.layers[0].mlp.up_proj.weight.count_nonzero())
    24
    >>> directory.cleanup()

What each event does:

    initialize          traces the model and rejects what cannot be pruned, before any modifier of
                        the recipe has begun
    calibration_start   prunes the whole model when the modifier's turn comes: exactly the requested
                        number of weights, with ties broken as everywhere in lap_ext

Once this module is imported, recipe files can name the modifier:

    prune_stage:
      pruning_modifiers:
        LookaheadModifier: {sparsity: 0.5, ignore: [lm_head]}

Weights that llm-compressor has moved to another device are pruned on that device; weights on disk
cannot be pruned. Put the modifier before quantization: a symmetric scheme keeps zeros at zero. GPTQ
does not, because it changes pruned weights too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, cast

import torch
from torch import nn

import lap_ext
from lap_ext.adapters.transformers import inputs_of
from lap_ext.allocation import Sparsity
from lap_ext.errors import LapImportError, LapValueError, calling
from lap_ext.options import BatchNorm, Normalize, OnUnsupported, Order, Residual, Scope
from lap_ext.structures import NM

with calling("lap_ext.adapters.llmcompressor"):
    try:
        from compressed_tensors.offload import is_distributed
        from compressed_tensors.offload.cache import OffloadCache
        from compressed_tensors.utils import match_named_modules
        from llmcompressor.core import Event, State
        from llmcompressor.modifiers import Modifier, ModifierFactory
        from pydantic import Field, PrivateAttr
    except ImportError as error:
        raise LapImportError(
            "the llmcompressor package (0.14 or later)",
            f"none that can be imported ({error})",
            "Run: pip install llmcompressor",
            name="llmcompressor",
        ) from error


_Fraction = Annotated[float, Field(ge=0, le=1)]
_UNSTRUCTURED = "0:0"  # as llm-compressor says it


class LookaheadModifier(Modifier):
    """Prunes a model by lookahead scores, or any other data-free criterion of lap_ext.

    Args:
        sparsity: the fraction of the layers' weights to remove; or a dict from layer name patterns
            (as in lap_ext) to fractions, where layers that match no pattern stay dense. With a
            mask_structure, that of its own, or None.
        mask_structure: as in llm-compressor: "N:M" prunes N of every M consecutive inputs; "0:0" is
            no structure.
        targets: the modules to prune, as in llm-compressor: names, classes, or "re:" patterns. All
            layers of the model count as neighbors of the targets.
        ignore: the modules among the targets that stay as they are.
        criterion: as in `lap_ext.prune`, by name.
        scope: as in `lap_ext.prune`.
        normalize: as in `lap_ext.prune`.
        order: as in `lap_ext.prune`.
        rounds: as in `lap_ext.prune`.
        min_keep: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        residual: as in `lap_ext.prune`.
        on_unsupported: as in `lap_ext.prune`.
        example_inputs: as in `lap_ext.prune`; not stored in recipes. With None, the model's
            dummy_inputs are used.

    Attributes:
        result: the `lap_ext.PruneResult` after oneshot; None before.
        masks: the masks of the result.

    Raises:
        TopologyError: raised by oneshot if the model cannot be traced.
        ValueError: an argument is not one of the above (pydantic's ValidationError). oneshot raises
            it as in `lap_ext.prune`; also if no layer is a target, or with several processes.

    Example:
        >>> LookaheadModifier(sparsity={"*mlp*": 0.9}, scope="global").targets
        'Linear'
    """

    sparsity: _Fraction | dict[str, _Fraction] | None = None
    mask_structure: str = _UNSTRUCTURED
    targets: str | list[str] = "Linear"
    ignore: str | list[str] = Field(default_factory=list)
    criterion: str = "lookahead"
    scope: Scope = "layer"
    normalize: Normalize = "auto"
    order: Order = "parallel"
    rounds: int = 1
    min_keep: int | float | None = None
    batch_norm: BatchNorm = "edge"
    residual: Residual = "sum"
    on_unsupported: OnUnsupported = "raise"
    example_inputs: Any = Field(default=None, exclude=True)

    _topology: lap_ext.Topology | None = PrivateAttr(default=None)
    _result: lap_ext.PruneResult | None = PrivateAttr(default=None)

    @property
    def result(self) -> lap_ext.PruneResult | None:
        """The result of the pruning; None before the pruning."""
        return self._result

    @property
    def masks(self) -> lap_ext.Masks:
        """Layer name -> mask; empty before the pruning."""
        return lap_ext.Masks({}) if self._result is None else self._result.masks

    @calling("LookaheadModifier")
    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Traces the model and raises the errors that the pruning would raise."""
        if is_distributed():
            raise LapValueError(
                "one process (there is no data to share, and processes may hold the same weights)",
                "several",
                "Run oneshot without torchrun.",
            )
        model: nn.Module = state.model
        with _plain(model):
            _check_in_memory(model)
            inputs = inputs_of(model, self.example_inputs)
            self._topology = lap_ext.trace(model, inputs, on_unsupported=self.on_unsupported)
            if self._pattern() is None and self.sparsity is not None:
                self._prune(_Nothing())
            else:
                self._prune(self.sparsity)  # a pattern cannot be tried without scores
        return True

    @calling("LookaheadModifier")
    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prunes the model."""
        with _plain(state.model):
            self._result = self._prune(self.sparsity)
            self._result.apply(state.model)

    def _pattern(self) -> NM | None:
        """Reads mask_structure, in which N of every M are pruned."""
        if self.mask_structure == _UNSTRUCTURED:
            return None
        pruned, colon, of = self.mask_structure.partition(":")
        if not (colon and pruned.isdecimal() and of.isdecimal() and 0 < int(pruned) < int(of)):
            raise LapValueError(
                "{argument} to be 'N:M' with 0 < N < M, where N of every M are pruned",
                repr(self.mask_structure),
                argument="mask_structure",
            )
        pattern = NM(int(of) - int(pruned), int(of))
        given = self.sparsity
        alike = isinstance(given, float | int) and math.isclose(given, pattern.sparsity)
        if given is not None and not alike:
            raise LapValueError(
                f"{{argument}} {pattern.sparsity:g} or none with mask_structure "
                f"{self.mask_structure!r}, which itself says how many are pruned",
                self.sparsity,
                argument="sparsity",
            )
        return pattern

    def _prune(self, sparsity: Sparsity | None) -> lap_ext.PruneResult:
        assert self._topology is not None
        topology, pattern = self._topology, self._pattern()
        targets, ignore = (
            [names] if isinstance(names, str) else names for names in (self.targets, self.ignore)
        )
        modules = match_named_modules(topology.model, targets, ignore)
        chosen = {id(x) for _, module in modules for x in module.parameters(recurse=False)}
        layers = [name for name, layer in topology.layers.items() if id(layer.weight) in chosen]
        if not layers:
            few = ", ".join(list(topology.layers)[:5])
            raise LapValueError(
                f"{{argument}} that name layers of the model ({few}, ...)",
                f"{targets} without {ignore}",
                argument="targets",
            )
        return lap_ext.prune(
            topology.model,
            None,
            sparsity if pattern is None else None,
            topology=topology,
            criterion=self.criterion,
            structure=pattern,
            scope=self.scope,
            normalize=self.normalize,
            order=self.order,
            rounds=self.rounds,
            min_keep=self.min_keep,
            layers=layers,
            batch_norm=self.batch_norm,
            residual=self.residual,
            apply=False,
        )


class _Nothing:
    """An allocation that names no layer, so that prune checks everything and scores nothing."""

    def keeps(self, shapes: Any, /) -> dict[str, int]:
        return {}


def _check_in_memory(model: nn.Module) -> None:
    """Checks that no weight is on disk or the meta device."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise LapValueError(
                "weights in memory",
                f"{name!r} on disk or the meta device",
                "Load the model without an offload directory, or run `lap-ext prune` on its "
                "checkpoint directory, which needs little memory.",
            )


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Makes the offloaded parameters themselves visible, not copies of them on another device.

    The trace then moves nothing, either.
    """
    with ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            parameters, buffers = cast(Any, module._parameters), cast(Any, module._buffers)
            if isinstance(parameters, OffloadCache):
                undo.callback(_set, module, parameters, buffers)
                _set(module, parameters.offloaded_values, buffers.offloaded_values)
        yield


def _set(module: Any, parameters: Any, buffers: Any) -> None:
    module._parameters, module._buffers = parameters, buffers


ModifierFactory.register("LookaheadModifier", LookaheadModifier)
