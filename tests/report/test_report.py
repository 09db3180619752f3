# SPDX-License-Identifier: MIT
"""The report: figures worked by hand, a page that stands alone, looked at in a browser."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from lap_ext import report
from lap_ext.report import Facts, Histogram, LayerFacts, Measure, charts, plots
from lap_ext.report.facts import binned

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome to open it in")


def measured(weight: torch.Tensor, kept: torch.Tensor, **how: object) -> LayerFacts:
    facts = LayerFacts("fc", "linear", tuple(weight.shape), "input", "out")
    measure = Measure(facts, **how)  # type: ignore[arg-type]
    measure.add(weight, kept)
    measure.finish()
    return facts


def some_facts(layers: int = 3, scored: bool = True) -> Facts:
    rows = []
    for index in range(layers):
        weight = torch.randn(12, 20)
        scores = weight.abs() * 2
        kept = scores > 2.0 if scored else weight.abs() > 0.5
        kept[index % 12] = False
        facts = LayerFacts(f"block.{index}.<linear>", "linear", (12, 20), "in & out", "head")
        measure = Measure(facts)
        measure.add(weight, kept, scores if scored else None)
        measure.finish()
        rows.append(facts)
    return Facts(
        "a <model>",
        "lookahead",
        rows,
        {"sparsity": "0.9"},
        ["pos_embed"],
        ["at torch.roll"],
        10_000,
        10_000,
        1_500,
        "0.1",
    )


def test_mass_is_the_share_of_the_squares() -> None:
    facts = measured(torch.tensor([[3.0, 1.0], [4.0, 2.0]]), torch.tensor([[1, 0], [0, 0]]) > 0)
    assert (facts.kept, facts.total) == (1, 4)
    assert facts.mass == 9 / (9 + 1 + 16 + 4)
    assert facts.sparsity == 0.75


def test_dead_rows_and_columns() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0], [5.0, 6.0, 0.0]])
    kept = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]]) > 0
    facts = measured(weight, kept)  # row 1; column 1, and column 2, which keeps zeros
    assert (facts.dead_rows, facts.dead_columns) == (1, 2)


def test_dead_columns_of_a_grouped_convolution() -> None:
    """[4, 2, 1, 1] in 2 groups: columns 0, 1 of rows 0, 1, then columns 0, 1 of rows 2, 3."""
    kept = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]).view(4, 2, 1, 1) > 0
    facts = measured(torch.ones(4, 2, 1, 1), kept, groups=2)
    assert (facts.columns, facts.dead_columns, facts.dead_rows) == (4, 2, 0)


def test_experts_are_measured_as_a_matrix() -> None:
    weight = torch.ones(2, 3, 4)
    kept = torch.ones(2, 3, 4, dtype=torch.bool)
    kept[1, 2] = False
    facts = measured(weight, kept, matrix=(6, 4), groups=2)
    assert (facts.rows, facts.dead_rows, facts.columns, facts.dead_columns) == (6, 1, 8, 0)


def test_chunks_give_the_same_as_the_full_weight() -> None:
    weight, kept = torch.randn(10, 3, 2), torch.rand(10, 3, 2) > 0.5
    full = measured(weight, kept)
    facts = LayerFacts("fc", "linear", (10, 3, 2), "input", "out")
    measure = Measure(facts)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 10)):
        measure.add(weight[rows].flatten(), kept[rows].flatten())
    measure.finish()
    assert facts.weights == full.weights
    assert (facts.kept, facts.dead_columns) == (full.kept, full.dead_columns)
    assert facts.square_kept == pytest.approx(full.square_kept, rel=1e-14)


def test_histogram_counts_every_weight_once() -> None:
    counts = Histogram()
    values = torch.cat([torch.rand(1000), torch.zeros(3), torch.tensor([1e-30, 1e30])])
    counts.add(values, torch.arange(1005) % 2 == 0)
    total = counts.kept.total() + counts.pruned.total() + counts.zeros_kept + counts.zeros_pruned
    assert total == 1005
    edges, kept, pruned = binned(counts)
    assert sum(kept) + sum(pruned) == 1002
    assert len(edges) == len(kept) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bins_are_exact(dtype: torch.dtype) -> None:
    """The numbers around each edge 2^(index / 4), in integers: x^4 against 2^index."""
    lowest = -4200 if dtype == torch.float64 else -4 * 126 if dtype == torch.bfloat16 else -590
    for index in [*range(-9, 10), 401, lowest, lowest + 3]:
        edge = torch.tensor(2.0 ** (index / 4), dtype=torch.float64).to(dtype)
        for x in (edge, edge.nextafter(edge * 0), edge.nextafter(edge * 4)):
            want = index + 8
            while Fraction(float(x)) ** 4 < Fraction(2) ** want:  # coarse among denormals
                want -= 1
            counts = Histogram()
            counts.add(x.repeat(3), torch.tensor([True, False, True]))
            assert (counts.kept, counts.pruned) == ({want: 2}, {want: 1}), (index, float(x))
            assert counts.lowest == float(x)


def test_bins_of_extremes() -> None:
    """Infinity is with the largest number; zeros and denormals of both kinds are distinguished."""
    counts = Histogram()
    ends = torch.tensor([5e-324, 0.0, 1e-310, 1.0, 1.7e308, torch.inf], dtype=torch.float64)
    counts.add(ends, torch.arange(6) % 2 == 0)
    assert (dict(counts.kept), counts.zeros_pruned) == ({-4296: 1, -4120: 1, 4095: 1}, 1)
    assert (dict(counts.pruned), counts.lowest) == ({0: 1, 4095: 1}, 5e-324)
    edges, kept, pruned = binned(counts)
    assert sum(kept) + sum(pruned) == 5 and all(map(math.isfinite, edges))
    counts.add(torch.tensor([1e-45, 0.0, torch.inf]), torch.tensor([True, True, True]))
    assert counts.kept[-149 * 4] == counts.zeros_kept == counts.kept[4 * 1024 - 1] - 1 == 1


def test_histograms_add_up_and_come_back_from_json() -> None:
    values, kept = torch.rand(100_000), torch.rand(100_000) < 0.5
    full, total = Histogram(), Histogram()
    full.add(values, kept)
    for batch, chosen in zip(values.split(40_000), kept.split(40_000), strict=True):
        part = Histogram()
        part.add(batch, chosen)
        total.update(Histogram.of_json(json.loads(json.dumps(part.to_json()))))
    assert total == full
    assert full.lowest == float(values[kept].min())
    assert Histogram().lowest is None


def test_bfloat16_and_empty_layers() -> None:
    facts = measured(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bool))
    assert facts.mass == 1.0
    empty = measured(torch.ones(0, 2), torch.ones(0, 2, dtype=torch.bool))
    assert (empty.total, empty.sparsity, empty.mass) == (0, 0.0, 1.0)
    assert "no weight but zeros" in report.html(Facts("m", "magnitude", [empty]))


class Page(HTMLParser):
    """Tags in order, and whether each that was opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "col", "wbr", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("scored", [True, False])
def test_page_stands_alone_and_is_well_formed(scored: bool) -> None:
    text = report.html(some_facts(30, scored))
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object"}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert not {"src", "onload", "onclick"} & set(attributes)
        assert attributes.get("href", "#layers").removeprefix("#") in ids
    assert "url(" not in text and "@import" not in text and "http:" not in text
    assert "https:" not in text


def test_page_says_what_was_measured() -> None:
    facts = some_facts()
    text = report.html(facts)
    for shown in (
        "a &lt;model&gt;", "block.<wbr>0.<wbr>&lt;linear&gt;", "in &amp; out", "pos_embed",
        "at torch.roll", charts.percent(facts.sparsity), charts.percent(facts.mass), "1 of 12",
        "1.5 kB", "10,000 bytes", f"{facts.kept:,}", "12 × 20", "lowest kept",
    ):  # fmt: skip
        assert shown in text, shown
    assert "<model>" not in text


def test_page_of_a_pruning_without_dead_channels() -> None:
    facts = Facts("m", "lookahead", [measured(torch.ones(2, 2), torch.ones(2, 2) > 0)])
    assert "None: no row and no column" in report.html(facts)
    assert "Size on disk" not in report.html(facts)  # not known


def test_pictures_have_names_for_screen_readers() -> None:
    counts = Histogram()
    counts.add(torch.rand(50), torch.rand(50) > 0.5)
    picture = ElementTree.fromstring(charts.histogram(counts, "fc, score", threshold=0.5))
    assert picture.get("role") == "img"
    assert "fc, score" in (picture.get("aria-label") or "")
    title = picture.find("title")
    assert title is not None and title.text == picture.get("aria-label")


def test_bars_of_a_histogram_have_the_heights_of_the_counts() -> None:
    counts = Histogram()
    counts.add(torch.tensor([1.0, 1.0, 1.0, 1.0, 8.0]), torch.tensor([0, 0, 0, 1, 1]) > 0)
    picture = ElementTree.fromstring(charts.histogram(counts, "w"))
    bars = [(x.get("class"), float(x.get("height") or 0)) for x in picture.iter("rect")]
    tall = 150 - 22 - 18  # of the highest column, 4 weights
    assert bars == [
        ("pruned", pytest.approx(tall * 3 / 4, abs=0.01)),
        ("kept", pytest.approx(tall * 1 / 4, abs=0.01)),
        ("kept", pytest.approx(tall * 1 / 4, abs=0.01)),
    ]


def test_write_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.html"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("os.fsync", full)
        report.write(path, some_facts())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    report.write(path, some_facts())
    assert path.read_text().startswith("<!doctype html>")


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    facts = some_facts()
    for figure in (
        plots.layers(facts.layers, "title"), plots.layers([]), plots.distributions(facts)
    ):  # fmt: skip
        path = tmp_path / "out.png"
        plots.save(path, figure)
        assert path.read_bytes().startswith(b"\x89PNG") and figure._repr_png_()[1:4] == b"PNG"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"expected a name that ends in .png"):
        plots.check(tmp_path / "out.gifs")


def test_plot_of_rows_without_masses() -> None:
    """As a PruneResult has them."""
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    from lap_ext.pruning.result import LayerResult

    figure = plots.layers([LayerResult("fc", "linear", (2, 2), 1, 4, 1)])
    bars = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert bars == [75.0, 4, 1]  # per cent removed; all and kept weights


@NEEDS_BROWSER
def test_page_in_a_browser(tmp_path: Path) -> None:
    """The page is drawn: its colors are in the picture, and no text is cut off at its right."""
    image = pytest.importorskip("PIL.Image", reason="pillow reads the picture")
    page, shot = tmp_path / "out.html", tmp_path / "out.png"
    report.write(page, some_facts())
    assert BROWSER is not None
    subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,2400",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    with image.open(shot) as picture:
        pixels = picture.convert("RGB")
        assert pixels.size == (1200, 2400)
        counts = {color: count for count, color in pixels.getcolors(1 << 24)}
        right = pixels.crop((1170, 0, 1200, 2400)).getcolors(1 << 24)
    for color in ((0x1B, 0x6C, 0xA8), (0xB4, 0x53, 0x09), (0x1F, 0x7A, 0x66)):  # kept, pruned, mass
        assert counts.get(color, 0) > 500
    assert len(right) == 1  # the page's ground, nothing sticks out
