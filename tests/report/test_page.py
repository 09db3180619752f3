# SPDX-License-Identifier: MIT
"""What a reader finds on the page: alarms, what varies, where it is, how it was made."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lap_ext import report
from lap_ext.report import Facts, LayerFacts, Measure, plots

NAMES = [f"bert.encoder.layer.{index}.attention.self.query" for index in range(30)]


def layer(name: str, sparsity: float = 0.5, criterion: str = "magnitude") -> LayerFacts:
    """A layer of 8 x 8 weights with a mask by magnitude, or by position."""
    weight = torch.randn(8, 8)
    keep = round(64 * (1 - sparsity))
    order = weight.abs().flatten().argsort(descending=True)
    kept = torch.zeros(64, dtype=torch.bool)
    kept[order[:keep] if criterion == "magnitude" else torch.arange(keep)] = True
    facts = LayerFacts(name, "linear", (8, 8), "input", "output", producers=(NAMES[0],))
    measure = Measure(facts)
    for rows in (slice(0, 24), slice(24, 64)):  # in chunks
        measure.add(weight.flatten()[rows], kept[rows])
    measure.finish()
    return facts


def page(rows: list[LayerFacts], **more: Any) -> str:
    return report.html(Facts("net", "lookahead", rows, **more))


class Tags(HTMLParser):
    """The tags of a page, each with its attributes and the text directly after it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)


def test_empty_layers_are_an_alarm_in_a_line_and_in_their_rows() -> None:
    text = page([layer(NAMES[0]), layer("gone<1>", 1.0), layer(NAMES[1])])
    (alarm,) = re.findall('<p class="alarm".*?</p>', text)
    assert "Empty: 1 of 3 layers keeps no weight (gone&lt;1&gt;)." in alarm
    assert text.index(alarm) < text.index('id="layers"')
    (row,) = re.findall("<tr class=empty>.*?</tr>", text)
    assert "gone&lt;1&gt;" in row and '<strong class="badge">empty</strong>' in row
    assert "1 empty" in text
    assert Facts("net", "lookahead", [layer("a", 1.0)]).to_dict()["empty_layers"] == ["a"]
    assert "class=empty" not in page([layer("a")]) and 'class="alarm"' not in page([layer("a")])
    assert "(a)" in page([layer("a", 1.0)]) and not layer("none").empty
    assert not LayerFacts("nothing", "linear", (0, 2)).empty


def test_what_is_the_same_in_every_layer_has_no_bars() -> None:
    even = page([layer(NAMES[0]), layer(NAMES[1])])
    assert "It is the same in every layer." in even
    table = even[even.index('id="layers-table"') : even.index('id="distributions"')]
    assert 'class="fill pruned"' not in table and 'class="fill mass"' in table
    uneven = page([layer(NAMES[0]), layer(NAMES[1], 0.8)])
    table = uneven[uneven.index('id="layers-table"') : uneven.index('id="distributions"')]
    assert 'class="fill pruned"' in table and "the same in every layer" not in uneven


def test_overlap_with_magnitude() -> None:
    assert layer("a").overlap == 1.0
    by_position = layer("a", criterion="position")
    assert by_position.overlap is not None and 0.2 < by_position.overlap < 0.8
    assert layer("a", 1.0).overlap is None and layer("a", 0.0).overlap == 1.0
    facts = LayerFacts("fc", "linear", (2, 2))
    measure = Measure(facts)
    weight = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    measure.add(weight, torch.tensor([[True, False], [False, True]]))  # magnitude: 4 and 3
    measure.finish()
    assert facts.overlap == 0.5


def test_the_important_columns_come_first_and_names_can_wrap() -> None:
    text = page([layer(name) for name in NAMES])
    (head,) = re.findall('id="layers-table".*?</thead>', text)
    columns = re.findall(r"<th[^>]*>([^<]*)</th>", head)
    assert columns[:3] == ["layer", "sparsity", "kept mass"] and columns[-1] == "kind"
    assert "bert.<wbr>encoder.<wbr>layer.<wbr>29.<wbr>attention" in text


def test_places_that_scroll_have_a_role_and_a_name() -> None:
    tags = Tags(page([layer(name) for name in NAMES], load=["import lap_ext"])).found
    areas = [attributes for _, attributes, _ in tags if attributes.get("tabindex") == "0"]
    assert len(areas) >= 5
    names = [attributes.get("aria-label") for attributes in areas]
    assert all(names) and len(set(names)) == len(names)
    assert all(attributes.get("role") == "region" for attributes in areas)
    scrolling = {"panel", "wide"}
    for tag, attributes, _ in tags:
        if tag == "pre" or attributes.get("class") in scrolling:
            assert attributes.get("tabindex") == "0", (tag, attributes)


def test_contents_sorting_and_filter() -> None:
    text = page([layer(name) for name in NAMES])
    tags = Tags(text).found
    links = [attributes["href"] for tag, attributes, _ in tags if tag == "a"]
    assert links == ["#layers", "#distributions", "#dead", "#topology", "#origin"]
    assert 'id="tools" hidden' in text  # until the script runs
    table = next(attributes for tag, attributes, _ in tags if tag == "table")
    assert table == {"id": "layers-table", "class": "layers sortable"}
    for used in ('"tools"', '"wanted"', '"count"', "#layers-table", ".grid figure"):
        assert used in text[text.index("<script>") :]


def test_the_topology_is_folded_and_drawn() -> None:
    text = page([layer(name) for name in NAMES])
    topology = text[text.index('id="topology"') : text.index('id="origin"')]
    details = topology.index("<details><summary>")
    assert details < topology.index("<table") and details < topology.index("<svg")
    assert topology.count('class="arc"') == 29  # the first layer feeds the others
    assert 'class="arc"' not in page([layer(f"{x}") for x in range(61)])


def test_how_it_was_made_and_how_to_load_it() -> None:
    text = page(
        [layer("a")],
        options={"scope": "layer"},
        version="0.1",
        torch="2.13",
        date="2026-01-02 03:04 UTC",
        command="lap-ext prune 'a b' --sparsity 0.5",
        seconds=12.34,
        load=["masks = lap_ext.Masks.load('<x>')"],
    )
    origin = text[text.index('id="origin"') :]
    for shown in (
        "lap_ext 0.1, torch 2.13", "2026-01-02 03:04 UTC", "12.3 s", "layer",
        "lap-ext prune &#x27;a b&#x27; --sparsity 0.5", "Masks.load(&#x27;&lt;x&gt;&#x27;)",
    ):  # fmt: skip
        assert shown in origin, shown


@pytest.mark.parametrize("count", [3, 30])
def test_the_plot_says_how_many_layers_it_leaves_out(count: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    facts = Facts("net", "lookahead", [layer(name) for name in NAMES[:count]])
    title = plots.distributions(facts)._suptitle
    said = None if title is None else title.get_text()
    assert said == (None if count == 3 else "The first 24 of 30 layers; 6 are left out.")
