# SPDX-License-Identifier: MIT
"""Units across layers on the page: families, what is fixed, masks of biases that are no layers."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import report
from lap_ext.pruning.reporting import model_facts
from lap_ext.report import Facts

X = torch.ones(2, 5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(12)
    return nn.Sequential(nn.Linear(5, 12), norm, nn.ReLU(), nn.Linear(12, 3)).eval()


def test_a_page_of_channels(tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model)
    result = lap_ext.prune(model, X, 0.25, structure="channel")
    assert set(result.masks) == {"0", "3", "0.bias", "1", "1.bias"}
    result.report(tmp_path / "page.html", before, X)
    page = (tmp_path / "page.html").read_text()
    (table,) = re.findall(r'<table id="units-table".*?</table>', page)
    assert "channels of" in table and table.count("3 of 12") == 2  # the family, and all
    assert '>9</td><td class="num" data-value="12">12</td>' in table
    assert "<p>Fixed: 3 channels of &#x27;3&#x27; (an output of the model).</p>" in page
    assert '<a href="#units">Units</a>' in page
    layers = re.findall(r'<table id="layers-table".*?</table>', page)[0]
    assert ">0.bias<" not in layers.replace("<wbr>", "")


def test_facts_of_channels() -> None:
    topology = lap_ext.trace(network(), X)
    given = {"topology": topology, "apply": False}
    result = lap_ext.prune(topology.model, None, 0.25, structure="channel", **given)
    facts = model_facts(topology, result, {}, title="net")
    shown = facts.to_dict()
    assert shown["families"] == [{"name": "0", "kept": 9, "total": 12}]
    assert shown["fixed"] == ["Fixed: 3 channels of '3' (an output of the model)."]
    assert [layer.name for layer in facts.layers] == ["0", "3"]
    assert facts.kept == result.kept == 9 * 5 + 9 * 3
    single = model_facts(topology, lap_ext.prune(topology.model, None, 0.5, **given), {}, title="n")
    assert "families" not in single.to_dict() and "units-table" not in report.html(single)


def test_another_model(tmp_path: Path) -> None:
    """A bias of another shape, or of no model, is found."""
    model = network()
    result = lap_ext.prune(model, X, 0.25, structure="channel", apply=False)
    wider = nn.Sequential(nn.Linear(5, 12, bias=False), *model[1:])
    with pytest.raises(ValueError, match=r"with a layer '0.bias' of shape \[12\], got none"):
        result.report(tmp_path / "page.html", wider, X)
    pruned = copy.deepcopy(model)
    result.apply(pruned)
    with pytest.raises(ValueError, match="the weights before the pruning"):
        result.report(tmp_path / "page.html", pruned, X)


def test_hostile_names() -> None:
    facts = Facts("net", "lookahead", [], structure="channel", families=[("<b>&", 1, 2)],
                  fixed=["Fixed: '<script>'."])  # fmt: skip
    page = report.html(facts)
    assert "<b>&" not in page.split("</style>")[1] and "&lt;script&gt;" in page
