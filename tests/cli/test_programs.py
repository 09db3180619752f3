# SPDX-License-Identifier: MIT
"""torch.export programs: a .pt2 file is never opened; one that a factory loads is pruned."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lap_ext
from tests.helpers.command_line import Run, one_line


class Net(nn.Module):
    """A residual sum, a batch norm, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        return self.head(nn.functional.max_pool2d(x + self.conv(x), 2).flatten(1))


IMAGES = torch.ones(2, 3, 4, 4)
SUBCOMMANDS = [
    ("prune", "--sparsity", "0.5", "--out", "out"), ("score",), ("inspect",), ("bench",),
]  # fmt: skip


@pytest.mark.parametrize("subcommand", SUBCOMMANDS, ids=lambda x: x[0])
def test_a_program_is_refused_unopened(
    run: Run, subcommand: tuple[str, ...], tmp_path: Path
) -> None:
    """torch.export.load runs pickles, and no check of its two zip readers' views is short."""
    os.mkfifo(tmp_path / "evil.pt2")  # whoever opened it would wait for ever
    name, *options = subcommand
    line = one_line(run(name, "evil.pt2", *options))
    assert "'evil.pt2', which can execute any code when it is loaded" in line
    assert "write a factory: program = torch.export.load(path)" in line
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "evil.pt2"}


def test_verify_refuses_a_program(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "evil.pt2")
    assert "a safetensors file, got 'evil.pt2'" in one_line(run("verify", "evil.pt2", "evil.pt2"))


@pytest.mark.parametrize("guards", [True, False])
def test_a_factory_may_load_a_program(
    run: Run, guards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module has no eval(), and guards are nodes of its graph."""
    torch.export.save(torch.export.export(Net().eval(), (IMAGES,)), tmp_path / "net.pt2")
    source = f"""
import torch

def make():
    program = torch.export.load("net.pt2")
    return program.module(check_guards={guards}), program.example_inputs[0]
"""
    (tmp_path / f"programs{guards}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = f"programs{guards}:make"
    status, out, error = run("prune", model, "--sparsity", "0.75", "--out", "out", "--json")
    assert (status, error) == (0, "")
    net = Net().eval()
    result = lap_ext.prune(net, IMAGES, 0.75)
    assert [row["kept"] for row in json.loads(out)["layers"]] == [x.kept for x in result.layers]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in net.named_parameters():
        assert torch.equal(saved[name], value), name
