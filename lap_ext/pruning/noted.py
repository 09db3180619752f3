# SPDX-License-Identifier: MIT
"""Spells which units are kept or go as a text, which a place can note."""

from __future__ import annotations

import base64
import zlib

import torch
from torch import Tensor

from lap_ext.masks import pack, unpack


def text_of(units: Tensor) -> str:
    """Packs a bool vector into a text.

    Example:
        >>> of_text(text_of(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])
    """
    return base64.b64encode(zlib.compress(pack(units.cpu()).numpy().tobytes())).decode()


def of_text(text: str, count: int) -> Tensor:
    """Unpacks what `text_of` has made."""
    data = bytearray(zlib.decompress(base64.b64decode(text)))
    return unpack(torch.frombuffer(data, dtype=torch.uint8), (count,))
