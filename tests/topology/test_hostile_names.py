# SPDX-License-Identifier: MIT
"""Names of modules: as code that torch.export writes and compiles, and as text that is shown."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.topology import render

# ends the string and the function that torch.export writes, and begins statements of its own
INJECTED = "x\")\rexec(\"import os; os\\x2eenviron['LAP_EXT_SPRUNG'] = '1'\")\rdef f():\r    (\""


class Named(nn.Module):
    """A layer under a name of any kind; its result is written in place through a view."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({name: nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.inner.values()
        y = layer(x)
        y.view(-1)[0:1].fill_(0)
        return y


def test_a_name_is_never_run_as_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAP_EXT_SPRUNG", raising=False)
    with suppress(lap_ext.TopologyError):
        lap_ext.trace(Named(INJECTED), torch.ones(1, 3))
    assert "LAP_EXT_SPRUNG" not in os.environ


@pytest.mark.parametrize(
    "name",
    [INJECTED, 'a"b', "a'b", "a\\b", "a\nb", "a\rb", "\x1b[31m", "\u202ea", "\ud800"],
    ids=ascii,
)
@pytest.mark.parametrize("where", ["module", "parameter", "buffer"])
def test_names_that_code_cannot_hold_are_refused(name: str, where: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    if where == "module":
        net = nn.Sequential(Named(name))
    elif where == "parameter":
        net.register_parameter(name, nn.Parameter(torch.ones(3, 3)))
    else:
        net.register_buffer(name, torch.ones(3, 3))
    with pytest.raises(lap_ext.TopologyError, match="Rename"):
        lap_ext.trace(net, torch.ones(1, 3))


@pytest.mark.parametrize(
    "name", ["$", "$\N{GREEK SMALL LETTER ALPHA}{x}$", "<b>", "层", "a b", "0"]
)
def test_other_names_are_names(name: str) -> None:
    topology = lap_ext.trace(nn.Sequential(Named(name)), torch.ones(1, 3), on_unsupported="cut")
    assert list(topology.layers) == [f"0.inner.{name}"]


HOSTILE = 'a"\\\x1b[31m\n&#27;<b>\u202e'


def test_a_name_in_a_graph_stays_in_its_label() -> None:
    """Graphviz reads quotes, backslashes and the entities of HTML."""
    text = render.dot([render.Row(HOSTILE, "linear", (2, 2), [], [])])
    (line,) = (line for line in text.split("\n") if "linear" in line)
    label = r"a\"\\\\x1b[31m\\n&amp;#27;<b>\\u202e"
    assert line == rf'  n0 [label="{label}\nlinear 2x2"];'


def test_a_name_in_a_note_stays_in_its_line() -> None:
    shown = 'a"\\' + r"\x1b[31m\n&#27;<b>\u202e"
    table = render.table([], [f"stopped at: {HOSTILE}"]).split("\n")
    assert table[2:] == [f"stopped at: {shown}"]
    page = render.html_of([], [f"stopped at: {HOSTILE}"])
    assert "\x1b" not in page and "<b>" not in page and "\u202e" not in page
