# SPDX-License-Identifier: MIT
"""The style sheet by arithmetic: contrasts in both color schemes, widths of the table of layers."""

from __future__ import annotations

import re

import pytest

from lap_ext.report import plots
from lap_ext.report.style import STYLE

SCHEMES = dict(zip(["light", "dark"], re.findall(r":root \{(.*?)\}", STYLE, re.S), strict=True))
TEXT, GRAPHICS = 4.5, 3.0  # WCAG 2.2, 1.4.3 (AA) and 1.4.11
GROUNDS = ["ground", "card"]


def colors(scheme: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", SCHEMES[scheme]))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_formula() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_color_has_contrast(scheme: str) -> None:
    """All that is used as a text, and all that a bar, line or dot is drawn with."""
    known = colors(scheme)
    used = set(re.findall(r"[ ;{]color: var\(--([\w-]+)\)", STYLE))
    used |= set(re.findall(r"svg text \{ fill: var\(--([\w-]+)\)", STYLE)) | {"ink"}
    texts = used - {"card"}  # on the alarm's own color
    assert {"quiet", "ink", "alarm", "kept"} <= texts
    for color in texts:
        for ground in GROUNDS:
            assert contrast(known[color], known[ground]) >= TEXT, (color, ground)
    assert contrast(known["card"], known["alarm"]) >= TEXT  # a badge
    for color in ("alarm", "ink", "quiet"):  # in the row of an empty layer
        assert contrast(known[color], known["alarm-ground"]) >= TEXT, color
    for color in ("kept", "pruned", "mass", "alarm"):
        for ground in (*GROUNDS, "track"):
            assert contrast(known[color], known[ground]) >= GRAPHICS, (color, ground)
    assert contrast(known["pruned"], known["card"]) >= TEXT


def test_plots_have_the_colors_of_the_page() -> None:
    light = colors("light")
    assert (plots._KEPT, plots._PRUNED, plots._MASS) == (
        light["kept"],
        light["pruned"],
        light["mass"],
    )


def width(selector: str, css: str) -> int:
    (found,) = re.findall(rf"(?<![\w-]){re.escape(selector)} \{{ (?:min-)?width: (\d+)px", css)
    return int(found)


def test_the_table_of_layers_fits() -> None:
    """In 1280 px all of it; in 375 px its name, sparsity and kept mass."""
    wide, narrow = STYLE.split("@media (max-width: 640px)")
    widths = [width(f".layers-{column}", wide) for column in range(9)]
    frame = 2  # px of the panel's border
    inside = min(1280, int(re.search(r"max-width: (\d+)px", wide)[1])) - 2 * 24 - frame
    assert sum(widths) == width("table.layers", wide) <= inside
    name = width(".layers-0, .pair-0", narrow)
    assert name + widths[1] + widths[2] <= 375 - 2 * 12 - frame
    assert width("table.layers", narrow) == name + sum(widths[1:])
    assert "overflow-wrap: anywhere" in wide and "position: sticky; left: 0" in wide
    assert ".panel, pre { overflow-x: auto; }" in wide
