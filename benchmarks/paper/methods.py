# SPDX-License-Identifier: MIT
"""What is compared: each method is a criterion of lap_ext.prune with its options.

A layer-wise method gives every layer the sparsity of the paper's ratios. A global one ranks all
pruned layers together and keeps as many weights in all. Layers that the ratios leave dense stay
dense for every method.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lap_ext
from benchmarks.paper.data import Data
from benchmarks.paper.settings import BATCH, Setting
from lap_ext import criteria


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str  # as the tables show it
    criterion: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data: bool = False  # looks at training images
    only_with_norms: bool = False  # is another one where the net has no batch norm
    only_chains: bool = False  # second derivatives, by BackPACK, which knows chains of layers

    def suits(self, setting: Setting) -> bool:
        """Tells whether it differs from the others on this net, and can be computed."""
        norms = setting.has_norms or not self.only_with_norms
        return norms and (setting.is_chain or not self.only_chains)


def _global(name: str, criterion: str, normalize: str) -> Method:
    return Method(name, criterion, {"scope": "global", "normalize": normalize})


METHODS: Mapping[str, Method] = {
    "mp": Method("MP", "magnitude"),
    "mp-bn": Method("MP-BN", "magnitude_bn", only_with_norms=True),
    "rp": Method("RP", "random"),
    "lfp": Method("LFP", "lookforward"),
    "lbp": Method("LBP", "lookback"),
    "lap": Method("LAP", "lookahead"),
    "lap-forward": Method("LAP-forward", "lookahead", {"order": "forward"}),
    "lap-backward": Method("LAP-backward", "lookahead", {"order": "backward"}),
    "lap-5": Method("LAP-seq (5)", "lookahead", {"rounds": 5}),
    "lap-act": Method("LAP-act", "lookahead_act", data=True),
    "obd": Method("OBD", "obd", data=True, only_chains=True),
    "obd-lap": Method("OBD+LAP", "obd_lookahead", data=True, only_chains=True),
    "wanda": Method("Wanda", "wanda", data=True),
    "global-mp": _global("global MP", "magnitude", "none"),
    "global-mp-norm": _global("global MP, norm", "magnitude", "norm"),
    "global-lap-norm": _global("global LAP, norm", "lookahead", "norm"),
    "lamp": _global("LAMP", "magnitude", "lamp"),
    "lap-lamp": _global("LAP-LAMP", "lookahead", "lamp"),
}


def available() -> tuple[str, ...]:
    """Returns the methods whose packages are installed."""
    chains = importlib.util.find_spec("backpack") is not None
    return tuple(name for name, method in METHODS.items() if chains or not method.only_chains)


def masks_of(
    topology: lap_ext.Topology,
    setting: Setting,
    method: Method,
    level: int,
    data: Data,
    batches: int,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
) -> Mapping[str, Tensor]:
    """Prunes the net in place.

    Args:
        topology: of the net whose weights are zeroed.
        setting: ratios, and which layers are left alone.
        method: what decides.
        level: how often the ratios are applied.
        data: training images for methods that look at them.
        batches: how many batches of these.
        seed: for all that is drawn.
        masks: of an earlier pruning: what they removed does not return.

    Returns:
        Layer name -> bool mask.
    """
    net = topology.model
    net.eval()
    torch.manual_seed(seed)
    random = method.criterion == "random"
    result = lap_ext.prune(
        net,
        None,
        topology=topology,
        sparsity=setting.allocation(net, level),  # in one ranking over all layers: their sum
        criterion=criteria.Random(seed) if random else method.criterion,
        exclude=setting.spared(net),
        data=data.calibration(batches, BATCH) if method.data else None,
        masks=masks,
        **method.options,
    )
    return result.masks
