# SPDX-License-Identifier: MIT
"""Groups of channels, units and heads of every entry of the zoo, by running it without them."""

from __future__ import annotations

import pytest

from tests import zoo
from tests.helpers import coupled_zoo
from tests.helpers.coupled_zoo import KINDS, NOTHING, ONE_FOR_TWO, groups, rows_of

each = pytest.mark.parametrize("name", [entry.name for entry in zoo.ENTRIES])


@each
def test_groups(name: str) -> None:
    if name not in ONE_FOR_TWO:
        assert [text for kind in KINDS for text in coupled_zoo.checked(name, kind)] == []
        assert [text for kind in KINDS for text in coupled_zoo.masks_differ(name, kind)] == []
    assert bool(len(groups(name, "channel"))) != (name in NOTHING)


@each
def test_what_is_fixed(name: str) -> None:
    """Every output channel of a layer is in a group, or cannot go for a reason in words."""
    for kind in KINDS:
        found = groups(name, kind)
        for fixed in found.fixed:
            assert len(fixed.reason.split()) >= 3 and fixed.reason == fixed.reason.strip()
            assert fixed.channels > 0 and fixed.layer
        gone = sum(group.channels for group in found)
        assert gone + sum(x.channels for x in found.fixed) == rows_of(name)
