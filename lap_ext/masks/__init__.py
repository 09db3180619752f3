# SPDX-License-Identifier: MIT
"""Applies the masks of a model's layers, keeps them in training and saves them as bits."""

from lap_ext._text import layer_name as layer_name
from lap_ext._text import parameter_in as parameter_in
from lap_ext.masks.file import BitMasks as BitMasks
from lap_ext.masks.file import pack as pack
from lap_ext.masks.file import unpack as unpack
from lap_ext.masks.masks import Masks as Masks
from lap_ext.masks.targets import revived_text as revived_text

__all__ = ["BitMasks", "Masks", "layer_name", "pack", "parameter_in", "revived_text", "unpack"]
