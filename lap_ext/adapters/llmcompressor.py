# SPDX-License-Identifier: MIT
"""Lookahead pruning in llm-compressor: a modifier for oneshot, without data.

    >>> import tempfile, transformers
    >>> from llmcompressor import oneshot
    >>> from lap_ext.adapters.llmcompressor import LookaheadModifier
    >>> ids = dict(vocab_size=16, bos_token_id=1, eos_token_id=2)
    >>> sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, head_dim=4)
    >>> config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **ids, **sizes)
    >>> folder = tempfile.TemporaryDirectory()  # your model's
    >>> transformers.LlamaForCausalLM(config).save_pretrained(folder.name)
    >>> modifier = LookaheadModifier(sparsity=0.75, ignore=["lm_head"])
    >>> model = oneshot(folder.name, recipe=modifier)  # output_dir=... writes it
    >>> modifier.masks.counts()["model.layers.0.mlp.up_proj"]
    (24, 96)
    >>> int(model.model.layers[0].mlp.up_proj.weight.count_nonzero())
    24
    >>> folder.cleanup()

What each event does:

    initialize          traces the model and refuses what cannot be pruned, before any modifier of the
                        recipe has begun
    calibration_start   prunes the whole model, in its turn among the modifiers: exactly as many
                        weights as asked for, ties as everywhere in lap_ext

In a recipe file the modifier has its own name, once this module is imported:

    prune_stage:
      pruning_modifiers:
        LookaheadModifier: {sparsity: 0.5, ignore: [lm_head]}

Weights that llm-compressor has moved to another device are pruned where they lie; on disk they
cannot be. Put it before quantization: a scheme that is symmetric keeps zeros zero. GPTQ does not, it
moves pruned weights too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, cast

import torch
from torch import nn

import lap_ext
from lap_ext.adapters.transformers import call_of

try:
    from compressed_tensors.offload import is_distributed
    from compressed_tensors.offload.cache import OffloadCache
    from compressed_tensors.utils import match_named_modules
    from llmcompressor.core import Event, State
    from llmcompressor.modifiers import Modifier, ModifierFactory
    from pydantic import Field, PrivateAttr
except ImportError as error:
    raise ModuleNotFoundError(
        "lap_ext.adapters.llmcompressor: expected the llmcompressor package (0.14 or later), got "
        f"none that can be imported ({error}). Run: pip install llmcompressor",
        name="llmcompressor",
    ) from error


_Fraction = Annotated[float, Field(ge=0, le=1)]


class LookaheadModifier(Modifier):
    """Prunes a model by lookahead scores, or any other data-free criterion of lap_ext.

    Args:
        sparsity: the fraction removed of the layers' weights; or a dict of layer name patterns of
            lap_ext and fractions, layers that match none stay dense.
        targets: modules to prune, as llm-compressor has them: names, classes, or "re:" patterns.
            Their neighbors are all layers of the model.
        ignore: modules among them that stay as they are.
        criterion: by name; scope, normalize, order, rounds, bn, skip and unknown too as in
            `lap_ext.prune`.
        example_inputs: for the trace; not stored in recipes. None: the model's dummy_inputs.

    Attributes:
        result: after oneshot, the `lap_ext.PruneResult`; masks: its masks.

    Raises:
        TopologyError: from oneshot: the model cannot be traced.
        ValueError: from oneshot: as `lap_ext.prune`; no layer is a target; several processes.

    Example:
        >>> LookaheadModifier(sparsity={"*mlp*": 0.9}, scope="global").targets
        'Linear'
    """

    sparsity: _Fraction | dict[str, _Fraction]
    targets: str | list[str] = "Linear"
    ignore: str | list[str] = Field(default_factory=list)
    criterion: str = "lookahead"
    scope: str = "layer"
    normalize: str = "none"
    order: str = "parallel"
    rounds: int = 1
    bn: str = "paper"
    skip: str = "sum"
    unknown: str = "error"
    example_inputs: Any = Field(default=None, exclude=True)

    _topology: lap_ext.Topology | None = PrivateAttr(default=None)
    _result: lap_ext.PruneResult | None = PrivateAttr(default=None)

    @property
    def result(self) -> lap_ext.PruneResult | None:
        """What was pruned, or None."""
        return self._result

    @property
    def masks(self) -> lap_ext.Masks:
        """Layer name -> mask; empty before the pruning."""
        return lap_ext.Masks({}) if self._result is None else self._result.masks

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Traces the model; raises what the pruning would."""
        if is_distributed():
            raise ValueError(
                "LookaheadModifier: expected one process (it needs no data to share out, and "
                "processes may hold the same weights), got several. Run oneshot without torchrun."
            )
        model: nn.Module = state.model
        with _plain(model):
            _check_in_memory(model)
            inputs, options = call_of("LookaheadModifier", model, self.example_inputs, {})
            self._topology = lap_ext.trace(model, inputs, unknown=self.unknown, **options)
            self._prune(_Nothing())
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prunes."""
        with _plain(state.model):
            self._result = self._prune(self.sparsity)
            self._result.masks.apply(state.model)

    def _prune(self, sparsity: Any) -> lap_ext.PruneResult:
        assert self._topology is not None
        topology = self._topology
        targets, ignore = (
            [names] if isinstance(names, str) else names for names in (self.targets, self.ignore)
        )
        modules = match_named_modules(topology.model, targets, ignore)
        chosen = {id(x) for _, module in modules for x in module.parameters(recurse=False)}
        others = [name for name, layer in topology.layers.items() if id(layer.weight) not in chosen]
        if len(others) == len(topology.layers):
            few = ", ".join(list(topology.layers)[:5])
            raise ValueError(
                f"LookaheadModifier: expected targets that name layers of the model ({few}, ...), "
                f"got {targets} without {ignore}."
            )
        return lap_ext.prune(
            topology.model, topology, sparsity, criterion=self.criterion, scope=self.scope,
            normalize=self.normalize, order=self.order, rounds=self.rounds, bn=self.bn,
            skip=self.skip, exclude=others, apply=False,
        )  # fmt: skip


class _Nothing:
    """An allocation that names no layer, so that prune checks all and scores nothing."""

    def keeps(self, shapes: Any, /) -> dict[str, int]:
        return {}


def _check_in_memory(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"LookaheadModifier: expected weights in memory, got {name!r} on disk or the meta "
                "device. Load the model without an offload folder, or run `lap-ext prune` on its "
                "folder, which needs little memory."
            )


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Parameters as they lie, not as copies on another device; so forward moves nothing, either."""
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
