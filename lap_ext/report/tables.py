# SPDX-License-Identifier: MIT
"""The tables of a page: the layers, dead channels, the topology, sizes.

The names of layers are long, so that they wrap after a dot or anywhere, and stay in place while
the other columns, the most important first, scroll below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lap_ext._text import in_html, shortened
from lap_ext.report.charts import bar, percent, size
from lap_ext.report.facts import Facts, LayerFacts

_LONGEST = 240  # letters of a text in a cell; the middle of a longer one is left out
_EVEN = 5e-4  # sparsities that differ by less than this beyond rounding are the same


def layers(facts: Facts) -> str:
    """Writes the table of layers: what was removed, and what varies between them."""
    even = _even(facts.layers)
    units = [layer.units for layer in facts.layers if layer.units is not None]
    head = "layer|sparsity|kept mass|#dead channels|overlap|#kept|#weights|#shape|kind"
    head += "|#units kept" if units else ""
    rows = [_layer(layer, even, bool(units)) for layer in facts.layers]
    dead = sum(layer.dead for layer in facts.layers)
    kept_units = sum(kept for kept, _ in units), sum(total for _, total in units)
    foot = (
        f'<tfoot><tr><th scope="row">all</th>{_barred(facts.sparsity, "" if even else "pruned")}'
        f"{_barred(facts.mass, 'mass')}{_count(dead)}<td></td>{_count(facts.kept)}"
        f"{_count(facts.total)}<td></td><td></td>{_units(kept_units) if units else ''}"
        "</tr></tfoot>"
    )
    counted = " Units are what the structure removes together." if units else ""
    same = " It is the same in every layer." if even and len(facts.layers) > 1 else ""
    return (
        '<h2 id="layers">Layers</h2><p class="quiet">Sparsity is the share of weights removed.'
        f"{same} Kept mass is the share of the layer's sum of squares that is left; overlap the "
        "share of the kept weights that magnitude would have kept as well; a dead channel is a row "
        f"or column of the weight that is all zero.{counted}</p>"
        '<p id="tools" hidden><label>Show layers with <input id="wanted" type="search" '
        'placeholder="attention, empty, ..."></label> <output id="count"></output></p>'
        + table("Layers", head.split("|"), rows, foot, kind="layers")
    )


def units(facts: Facts) -> str:
    """Writes the table of units across layers, and what cannot be removed; or nothing."""
    if not facts.families:
        return ""
    rows = [
        f"<tr>{name(family)}{_share(total - kept, total)}{_count(kept)}{_count(total)}</tr>"
        for family, kept, total in facts.families
    ]
    kept, total = (sum(counts) for counts in list(zip(*facts.families, strict=True))[1:])
    foot = (
        f'<tfoot><tr><th scope="row">all</th>{_share(total - kept, total)}{_count(kept)}'
        f"{_count(total)}</tr></tfoot>"
    )
    what = in_html(f"{facts.structure}s of")
    fixed = "".join(f"<p>{in_html(shortened(note))}</p>" for note in facts.fixed)
    return (
        '<h2 id="units">Units</h2><p class="quiet">What goes as a whole, by the layers that make '
        "it: with rows of these, their biases and norms, and columns of the layers that read it."
        "</p>" + table("Units", (what, "removed", "#kept", "#all"), rows, foot, "pair") + fixed
    )


def _layer(layer: LayerFacts, even: bool, with_units: bool) -> str:
    mark = ' <strong class="badge">empty</strong>' if layer.empty else ""
    overlap = layer.overlap
    return (
        f"<tr{' class=empty' if layer.empty else ''}>{name(layer.name)}"
        f"{_barred(layer.sparsity, '' if even else 'pruned', mark)}{_barred(layer.mass, 'mass')}"
        f"{_count(layer.dead)}"
        + ('<td data-value="-1">-</td>' if overlap is None else _barred(overlap, "kept"))
        + f"{_count(layer.kept)}{_count(layer.total)}"
        f'<td class="num" data-value="{layer.total}">{" × ".join(map(str, layer.shape))}</td>'
        f"<td>{_wrapped(layer.kind)}</td>{_units(layer.units) if with_units else ''}</tr>"
    )


def _units(units: tuple[int, int] | None) -> str:
    """Writes the cell of the units of a structure that are kept."""
    if units is None:
        return '<td data-value="-1">-</td>'
    kept, total = units
    return f'<td class="num" data-value="{kept}">{kept:,} of {total:,}</td>'


def _even(rows: Sequence[LayerFacts]) -> bool:
    """Tells whether all layers have the same sparsity, up to the rounding of a count."""
    full = [layer for layer in rows if layer.total]
    if not full:
        return False
    sparsities = [layer.sparsity for layer in full]
    rounding = 1 / min(layer.total for layer in full)
    return max(sparsities) - min(sparsities) <= rounding + _EVEN


def dead(facts: Facts) -> str:
    """Writes the table of layers with dead rows or columns."""
    title = '<h2 id="dead">Dead channels</h2>'
    found = [layer for layer in facts.layers if layer.dead]
    if not found:
        return f"{title}<p>None: no row and no column of a pruned weight is all zero.</p>"
    rows = [
        f"<tr>{name(layer.name)}{_share(layer.dead_rows, layer.rows)}"
        f"{_share(layer.dead_columns, layer.columns)}</tr>"
        for layer in found
    ]
    return (
        f'{title}<p class="quiet">Rows and columns of a weight that are all zero: '
        "apart from biases, removing them would not change the output.</p>"
        + table("Dead channels", ("layer", "rows", "columns"), rows, kind="pair")
    )


def topology(facts: Facts) -> str:
    """Writes what feeds and what reads each layer, as a table."""
    rows = [
        f"<tr>{name(layer.name)}<td>{_wrapped(layer.fed_by)}</td>"
        f"<td>{_wrapped(layer.read_by)}</td></tr>"
        for layer in facts.layers
    ]
    return table("Topology", ("layer", "fed by", "read by"), rows, kind="pair")


def sizes(facts: Facts) -> str:
    """Writes the table of sizes, or nothing where they are not known."""
    rows = [
        ("before", facts.bytes_before, "kept"),
        ("after, zeros stored", facts.bytes_after, "kept"),
        ("after, kept values and one bit a weight (computed)", facts.bytes_sparse, "mass"),
    ]
    known = [(what, count, kind) for what, count, kind in rows if count is not None]
    if not known:
        return ""
    most = max(count for _, count, _ in known) or 1
    cells = [
        f'<tr><th scope="row">{what}</th><td>{bar(count / most, kind, size(count))}'
        f'</td><td class="num">{count:,} bytes</td></tr>'
        for what, count, kind in known
    ]
    return (
        '<h2 id="sizes">Size on disk</h2><p class="quiet">A pruned checkpoint stores its zeros, so '
        "that every tool can read it; the last row is the size in a sparse format.</p>"
        + table("Size on disk", ("", "size", "#exactly"), cells, kind="plain")
    )


def table(
    label: str, head: Sequence[str], rows: Iterable[str], foot: str = "", kind: str = "plain"
) -> str:
    """Writes a table in an area that scrolls; a column whose head begins with # holds numbers.

    The style sheet has the widths of the columns of each kind of table.
    """
    cells = "".join(
        f'<th scope="col"{" class=num" if text.startswith("#") else ""}>{text.lstrip("#")}</th>'
        for text in head
    )
    columns = "".join(f'<col class="{kind}-{index}">' for index in range(len(head)))
    sortable = "" if kind == "plain" else " sortable"
    return (
        f'<div class="panel" role="region" aria-label="{label}, scrollable" tabindex="0">'
        f'<table id="{label.lower().replace(" ", "-")}-table" class="{kind}{sortable}">'
        f"<colgroup>{columns}</colgroup><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>{foot}</table></div>"
    )


def name(text: str) -> str:
    """Writes the first cell of a row: a layer's name, in full in a tooltip where it is cut."""
    title = f' title="{in_html(shortened(text))}"' if len(text) > _LONGEST else ""
    return f'<th scope="row"{title}>{_wrapped(text)}</th>'


def _wrapped(text: str) -> str:
    """Writes a text that may wrap after each dot, without its middle where it is too long."""
    half = _LONGEST // 2
    shown = text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"
    return in_html(shown).replace(".", ".<wbr>")


def _barred(share: float, kind: str, mark: str = "") -> str:
    """Writes the cell of a share: a number, with a bar unless there is no kind of one."""
    shown = bar(share, kind) if kind else f'<span class="value">{percent(share)}</span>'
    return f'<td data-value="{share:.6f}">{mark}{shown}</td>'


def _share(part: int, total: int) -> str:
    share = part / total if total else 0.0
    return f'<td data-value="{share:.6f}">{bar(share, "pruned", f"{part:,} of {total:,}")}</td>'


def _count(count: int) -> str:
    return f'<td class="num" data-value="{count}">{count:,}</td>'
