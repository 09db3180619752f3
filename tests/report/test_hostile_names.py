# SPDX-License-Identifier: MIT
"""Names and numbers of any kind in a page and in plots."""

from __future__ import annotations

import base64
import hashlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lap_ext import report
from lap_ext.report import Facts, LayerFacts, Measure, page, plots

HOSTILE = '<script>alert(1)</script>"\x1b[31m\u202e\n\ud800&$x^{$'
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "script-src 'sha256-{hash}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
)


def facts_of(name: str, weight: Tensor) -> Facts:
    layer = LayerFacts(name, name, tuple(weight.shape), name, name)
    measure = Measure(layer)
    measure.add(weight, weight >= weight.median(), weight.abs())
    measure.finish()
    return Facts(name, name, [layer], {name: name}, [name], [name], 1, 1, 1, name)


def test_hostile_names_in_a_page(tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", facts_of(HOSTILE, torch.eye(4)))
    text = (tmp_path / "r.html").read_text()
    assert text.replace("\n", "").isprintable()
    assert text.count("<script") == 1 and "<script>alert" not in text and '"\\x1b' not in text
    assert r"&quot;\x1b[31m\u202e\n\ud800&amp;$x^{$" in text


def test_the_page_lets_nothing_be_loaded_and_only_its_own_script_be_run() -> None:
    text = report.html(facts_of("fc", torch.eye(4)))
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    policy = POLICY.format(hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    assert policy in text and text.index(policy) < text.index("<style>")
    assert text.startswith(page.BEGIN)
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval|fetch|import|http", script)


def test_an_ending_tag_in_a_name_does_not_end_the_script() -> None:
    named = report.html(facts_of("</script><b>", torch.eye(4)))
    assert named.count("</script>") == 1 and "&lt;/script&gt;" in named


def test_a_long_name_is_cut_on_the_page() -> None:
    text = report.html(facts_of(f"first{'x' * 200_000}last", torch.eye(4)))
    (table,) = re.findall('id="layers-table".*?</table>', text, re.DOTALL)
    assert len(table) < 5000 and "…" in table and "last</th>" in table


@pytest.mark.parametrize(
    "name",
    ["$x^{$", "_", "\N{CJK UNIFIED IDEOGRAPH-5C42}", HOSTILE],
    ids=ascii,
)
def test_hostile_names_in_a_plot(name: str, tmp_path: Path) -> None:
    _draw(facts_of(name, torch.eye(4)), tmp_path / "plot.png")


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_hostile_names_in_other_formats(suffix: str, tmp_path: Path) -> None:
    _draw(facts_of(HOSTILE, torch.eye(4)), tmp_path / f"plot.{suffix}")
    assert b"<script" not in (tmp_path / f"plot.{suffix}").read_bytes()


def test_a_plot_is_not_set_by_tex(tmp_path: Path) -> None:
    """TeX would read files and run commands that a name tells it to."""
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws")
    with matplotlib.rc_context({"text.usetex": True}):
        figure = plots.layers(facts_of("\\input{x}", torch.eye(4)).layers, "\\input{x}")
    (label,) = figure.axes[0].get_yticklabels()
    assert not label.get_usetex() and not label.get_parse_math()
    assert not figure._suptitle.get_usetex()


def test_a_long_name_is_cut_in_a_plot(tmp_path: Path) -> None:
    """Of 200,000 letters it took matplotlib two minutes."""
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    name = f"first{'x' * 20_000}last"
    figure = plots.layers(facts_of(name, torch.eye(4)).layers, name)
    (label,) = figure.axes[0].get_yticklabels()
    for text in (label.get_text(), figure._suptitle.get_text()):
        assert len(text) < 100 and text.startswith("first") and text.endswith("last")
    _draw(facts_of(name, torch.eye(4)), tmp_path / "plot.png")


@pytest.mark.parametrize("largest", [1.7e308, 5e-324, torch.inf, 0.0], ids=str)
def test_numbers_at_the_ends_of_double(largest: float, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    weight = torch.linspace(0.5, 1, 16, dtype=torch.float64).view(4, 4) * largest
    facts = facts_of("fc", weight)
    report.write(tmp_path / "r.html", facts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's own sums overflow
        for figure in (plots.layers(facts.layers), plots.distributions(facts)):
            plots.save(tmp_path / "plot.png", figure)


def test_a_format_that_cannot_be_written_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as .pgf without LaTeX."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib draws").Figure
    plots.check(Path("a.png"))

    def fail(*given: object, **more: object) -> None:
        raise RuntimeError("'xelatex' not found;\ninstall it.")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(ValueError, match=r"got 'a\.pgf': 'xelatex' not found; install it\. Use"):
        plots.check(Path("a.pgf"))


def _draw(facts: Facts, path: Path) -> None:
    """Draws both plots, without a warning."""
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (plots.layers(facts.layers, facts.title), plots.distributions(facts)):
            plots.save(path, figure)
