# SPDX-License-Identifier: MIT
"""Says in words what goes with the output channels of a layer."""

from __future__ import annotations

from collections import Counter

from lap_ext.topology.coupling.groups import CoupledGroups, Member

_LISTED = 12  # of many parameters, the first ones say it


def explained(groups: CoupledGroups, layer: str) -> str:
    """Explains the output channels of a layer: what goes with each, and which cannot go and why."""
    lines, outputs = [], 0
    for x in groups.weights:
        if x.layer != layer:
            continue
        side = x.cols.flatten() if x.transposed else x.rows
        outputs = max(outputs, side.numel())
        kinds: Counter[tuple[str, ...]] = Counter()
        numbers, counts = side[side >= 0].unique(return_counts=True)
        for number, own in zip(numbers.tolist(), counts.tolist(), strict=True):
            kinds[tuple(map(_spelled, groups.members(number)))] += own
        for members, count in kinds.items():
            lines.append(f"  {count} can be removed, each with")
            lines += [f"    {text}" for text in members[:_LISTED]]
            if len(members) > _LISTED:
                lines.append(f"    and more of {len(members) - _LISTED} parameters")
    for fixed in groups.fixed:
        if fixed.layer == layer:
            lines.append(f"  {fixed.channels} cannot be removed: {fixed.reason}")
    return "\n".join([f"{layer}: {outputs} output channels", *lines])


def _spelled(member: Member) -> str:
    """Counts what a group has of a parameter: "2 columns of fc.weight"."""
    kind = "entry" if len(member.shape) == 1 else "row" if member.cols is None else "column"
    index = member.rows if member.cols is None else member.cols
    count = member.shape[0] if index is None else index.numel()
    plural = {"entry": "entries"}.get(kind, f"{kind}s")
    return f"{count} {kind if count == 1 else plural} of {member.parameter}"
