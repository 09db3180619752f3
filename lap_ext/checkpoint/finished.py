# SPDX-License-Identifier: MIT
"""Which shards of an interrupted run are still as they were written: each is read again.

A shard, and the masks of its layers, must have the checksums that were noted when they were
written. They are CRC-32: what is to be found is damage, not malice (whoever can write here can
write the notes too), and it is computed in the background at 1 to 3 GB/s on any CPU, where SHA-256
without instructions of its own does 0.4.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from lap_ext.checkpoint import inside
from lap_ext.checkpoint.files import Shard
from lap_ext.checkpoint.reading import Buffer
from lap_ext.checkpoint.shards import Writer
from lap_ext.checkpoint.state import Work
from lap_ext.checkpoint.writing import MaskFile
from lap_ext.errors import LapValueError, warn
from lap_ext.progress import Step

_READ = 1 << 20  # bytes of a shard at a time


def finished(writer: Writer, work: Work) -> set[str]:
    """Names the shards that need not be written again; warns of those that do."""
    noted, masks = work.facts["done"], writer.masks
    shards = [shard for shard in writer.checkpoint.shards if shard.name in noted]
    total = sum(shard.size for shard in shards)
    step = Step(writer.task.scoring.on_progress, "check", total)
    good = [x for x in shards if _checksum(work.files / x.name, x, step) == noted[x.name][0]]
    again = [repr(shard.name) for shard in shards if shard not in good]
    if good and masks is not None:
        expected = {shard.name: noted[shard.name][1] for shard in good}
        if not _intact(writer, good, masks, expected):
            good, again = [], ["the masks", *(repr(shard.name) for shard in shards)]
    if again:
        warn(
            f"What an interrupted run has left in {str(work.directory)!r} is damaged in part. "
            f"These are done again: {', '.join(again)}."
        )
    return {shard.name for shard in good}


def _checksum(path: Path, shard: Shard, step: Step) -> int | None:
    """Computes the checksum of a finished shard; None if there is no such file."""
    buffer, checksum, size = Buffer().view(_READ), 0, 0
    try:
        with inside.opened(path) as file:
            while count := file.readinto(buffer):
                checksum, size = zlib.crc32(buffer[:count], checksum), size + count
                if size > shard.size:
                    return None
                step.read("", count)
    except (LapValueError, OSError):  # gone, a link, a directory, unreadable
        return None
    return checksum if size == shard.size else None


def _intact(writer: Writer, shards: list[Shard], masks: MaskFile, expected: dict[str, int]) -> bool:
    """Whether the mask file is there with the masks of these shards."""
    if not masks.open_complete():
        return False
    try:
        return masks.padded and all(
            _checksum_of_masks(writer, x, masks) == expected[x.name] for x in shards
        )
    finally:
        masks.close()


def _checksum_of_masks(writer: Writer, shard: Shard, masks: MaskFile) -> int:
    """Computes the checksum of the masks of a shard's tensors, a byte per weight, in its order."""
    every, checksum = dict(writer.vectors), 0
    every |= {name: (layer.name, stored) for name, (layer, stored) in writer.layers.items()}
    for entry in shard.entries:
        if entry.name in every:
            name, stored = every[entry.name]
            checksum = masks.checksum(name, stored.begin, entry.numel, checksum)
    return checksum
