# SPDX-License-Identifier: MIT
"""Text for people: aligned columns, enumerations, "did you mean", patterns and names of layers.

Names come from files that anyone may have written. `visible` is what makes them safe to show; the
functions that make text of them apply it.
"""

from __future__ import annotations

import difflib
import html
from collections.abc import Container, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest

_WIDEST = 100  # letters of a column; a longer cell moves the rest of its own row only
_NARROWEST = 8  # letters of a column of names
_LONGEST = 1000  # letters of a part of an error: a name in a file may have a million


def visible(text: str, keep: str = "") -> str:
    r"""Replaces what is not printable by its escape: controls of terminals, lines and direction.

    Letters and signs of all languages stay, with the joiners (U+200C, U+200D) that some need.

    Args:
        text: such as a name that a file contains.
        keep: characters that stay, such as the line breaks of a text of several lines.

    Example:
        >>> print(visible("\x1b[31mfc\n\u202egnp"), visible("层.α"))
        \x1b[31mfc\n\u202egnp 层.α
    """
    if text.isprintable():
        return text
    kept = f"{keep}\u200c\u200d"
    return "".join(
        letter
        if letter.isprintable() or letter in kept
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def shortened(text: str, most: int = _LONGEST) -> str:
    """Cuts a text that is too long to be read.

    Example:
        >>> shortened("abcdef", 3), shortened("abc", 3)
        ('abc...', 'abc')
    """
    return text if len(text) <= most else f"{text[:most]}..."


def in_html(text: str) -> str:
    r"""Makes a text that is safe to show part of a page, or of an attribute in quotes.

    Example:
        >>> print(in_html('<b>"\x1b"'))
        &lt;b&gt;&quot;\x1b&quot;
    """
    return html.escape(visible(text))


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligns rows in columns.

    Args:
        rows: of cells; the first row is the head.
        right: indices of the columns that are aligned to the right, as numbers are.

    Example:
        >>> print(columns([("layer", "kept"), ("fc", "8"), ("head", "16")], right=[1]))
        layer  kept
        -----  ----
        fc        8
        head     16
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [min(_WIDEST, max(map(len, column))) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def elided(text: str, most: int) -> str:
    """Leaves out the middle of a text that is longer than so many letters.

    Example:
        >>> elided("encoder.layer.11.output.dense", 18), elided("fc", 18)
        ('encoder....t.dense', 'fc')
    """
    if len(text) <= most:
        return text
    left = max(1, most - 3)
    return f"{text[: left - left // 2]}...{text[len(text) - left // 2 :]}"


def fitted(
    rows: Sequence[Sequence[str]], flexible: Sequence[int], width: int
) -> list[Sequence[str]]:
    """Fits the rows of a table into a width: wraps lists, and elides the middle of long names.

    Args:
        rows: as in `columns`.
        flexible: the columns with names, or lists of names, that may become narrower.
        width: letters of a line.

    Example:
        >>> rows = [("layer", "kept", "read by"), ("fc", "8", "block.0.left, block.0.right")]
        >>> print(columns(fitted(rows, [0, 2], 26)))
        layer  kept  read by
        -----  ----  -------------
        fc     8     block.0.left,
                     block.0.right
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    widest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = width - 2 * (len(widest) - 1) - sum(widest) + sum(widest[i] for i in flexible)
    narrow = {}
    for count, column in enumerate(sorted(flexible, key=lambda i: widest[i])):
        narrow[column] = min(widest[column], max(_NARROWEST, left // (len(flexible) - count)))
        left -= narrow[column]
    result: list[Sequence[str]] = []
    for row in rows:
        cells = [_wrapped(cell, narrow[i]) if i in narrow else [cell] for i, cell in enumerate(row)]
        result += zip_longest(*cells, fillvalue="")
    return result


def _wrapped(items: str, width: int) -> list[str]:
    """Breaks an enumeration into lines."""
    *others, last = items.split(", ")
    broken = [""]
    for item in [*(f"{elided(x, width - 1)}," for x in others), elided(last, width)]:
        if broken[-1] and len(broken[-1]) + 1 + len(item) > width:
            broken.append("")
        broken[-1] = f"{broken[-1]} {item}".lstrip()
    return broken


def html_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    r"""Writes rows as an HTML table, for notebooks.

    Args:
        rows: as in `columns`.
        right: as in `columns`.

    Example:
        >>> table = html_table([("layer", "kept"), ("a<b", "8")], right=[1])
        >>> print(table.replace("<t", "\n<t"))
        <BLANKLINE>
        <table>
        <thead>
        <tr>
        <th style="text-align:left">layer</th>
        <th style="text-align:right">kept</th></tr></thead>
        <tbody>
        <tr>
        <td style="text-align:left">a&lt;b</td>
        <td style="text-align:right">8</td></tr></tbody></table>
    """

    def line(row: Sequence[str], tag: str) -> str:
        sides = ["right" if column in right else "left" for column in range(len(row))]
        cells = [
            f'<{tag} style="text-align:{side}">{in_html(cell)}</{tag}>'
            for side, cell in zip(sides, row, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    head, *body = rows
    lines = "".join(line(row, "td") for row in body)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{lines}</tbody></table>"


def some(items: Iterable[str], most: int) -> str:
    """Enumerates the first items and counts the others.

    Example:
        >>> some(["a", "b", "c", "d"], 2), some(["a", "b"], 2)
        ('a, b and 2 more', 'a, b')
    """
    items = list(map(visible, items))
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def lines(items: Sequence[str], most: int) -> str:
    r"""Puts the first items on indented lines of their own, each after a line break.

    Example:
        >>> lines(["fc: [1, 2]", "head: [3]"], 1)
        '\n  fc: [1, 2].\n  and 1 more.'
    """
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return "".join(f"\n  {visible(item)}." for item in [*items[:most], *more])


def did_you_mean(given: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """Suggests names close to a wrong one, as a sentence; empty where none is close.

    Args:
        given: the wrong name.
        known: the right ones.
        most: how many to suggest.
        cutoff: how close they must be, 0 to 1 (as in difflib).

    Example:
        >>> did_you_mean("lookahed", ["lookahead", "magnitude"]), did_you_mean("x", ["magnitude"])
        ("Did you mean 'lookahead'?", '')
    """
    close = difflib.get_close_matches(given, list(known), n=most, cutoff=cutoff)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else ""


def meant_layers(given: str, names: Sequence[str], most: int = 5) -> str:
    """Says what a pattern that matches no layer may stand for, or lists the first layers.

    Args:
        given: the pattern.
        names: those of the layers.
        most: how many to list.

    Example:
        >>> names = ["encoder.layer.0.fc", "encoder.layer.1.fc", "head"]
        >>> meant_layers("hed", names), meant_layers("encoder", names)
        ("Did you mean 'head'?", "Did you mean 'encoder.*'?")
        >>> meant_layers("conv*", names, most=2)
        'The layers are encoder.layer.0.fc, encoder.layer.1.fc and 1 more.'
    """
    if any(name.startswith(f"{given}.") for name in names):
        return f"Did you mean {f'{given}.*'!r}?"
    known: Iterable[str] = names
    if any(sign in given for sign in "*?["):
        parts = [name.split(".") for name in names]
        starts = (".".join([*x[:i], "*"]) for x in parts for i in range(1, len(x)))
        known = dict.fromkeys([*starts, *(f"*.{x[-1]}" for x in parts)])
    if hint := did_you_mean(given, known, most=3):
        return hint
    return f"The layers are {some(names, most)}." if names else "There are no layers."


def matches(name: str, pattern: str) -> bool:
    """Tells whether a layer's name is the pattern, or matches it as file names do (*, ?, [abc])."""
    return name == pattern or fnmatchcase(name, pattern)


def layer_name(parameter: str) -> str:
    """Names the layer of a parameter: the parameter's name without a trailing ".weight".

    Example:
        >>> layer_name("conv1.weight"), layer_name("attn.in_proj_weight")
        ('conv1', 'attn.in_proj_weight')
    """
    return parameter.removesuffix(".weight")


def parameter_in(layer: str, known: Container[str]) -> str | None:
    """Finds the parameter that a layer's name stands for; None if none of them is known.

    Example:
        >>> parameter_in("conv1", {"conv1.weight"}), parameter_in("conv1", {"conv2.weight"})
        ('conv1.weight', None)
    """
    return next((name for name in parameter_names(layer) if name in known), None)


def parameter_names(layer: str) -> tuple[str, str]:
    """Lists the parameters that a layer's name may stand for, the most likely one first.

    Example:
        >>> parameter_names("conv1")
        ('conv1.weight', 'conv1')
    """
    return f"{layer}.weight", layer
