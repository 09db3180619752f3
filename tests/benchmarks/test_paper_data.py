# SPDX-License-Identifier: MIT
"""The data of the paper's experiment: read through torchvision's classes, cropped, and missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

for needed in ("rich", "sklearn"):
    pytest.importorskip(needed, reason="the benchmarks need the extras bench and demo")

from benchmarks.paper import __main__ as command  # noqa: E402
from benchmarks.paper import data  # noqa: E402


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


def fake_vision(sets: dict[str, Any]) -> ModuleType:
    module = ModuleType("torchvision")
    module.datasets = SimpleNamespace(**sets)  # type: ignore[attr-defined]
    return module


def test_torchvision_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu: torch.device
) -> None:
    def cifar(root: str, train: bool, download: bool) -> Any:
        assert (root, download) == (str(tmp_path), False)
        images = torch.arange(3 * 32 * 32 * 3, dtype=torch.int64) % 251
        return SimpleNamespace(
            data=images.to(torch.uint8).view(3, 32, 32, 3).numpy()[: 3 if train else 2],
            targets=[3, 1, 2][: 3 if train else 2],
        )

    monkeypatch.setitem(sys.modules, "torchvision", fake_vision({"CIFAR10": cifar}))
    found = data.load("cifar10", tmp_path, cpu)
    assert found.x_train.shape == (3, 3, 32, 32)
    assert found.x_train[0, 2, 0, 1] == 5  # the last channel of the second pixel
    x, y = found.batch(2)
    assert x.shape == (2, 3, 32, 32)
    assert x.dtype == torch.float32
    assert len(y) == 2
    (images, labels), *rest = found.tests()
    assert (rest, labels.tolist()) == ([], [3, 1])
    # (5 / 255 - mean) / deviation of the last channel
    assert images[0, 2, 0, 1].item() == pytest.approx((5 / 255 - 0.4465) / 0.261, rel=1e-6)
    given = found.calibration(2, 2)
    assert [len(x) for x, _ in given] == [2, 1]


def test_shifted_is_a_crop_of_the_padded_image() -> None:
    x = torch.arange(1, 1 + 8 * 2 * 6 * 6).view(8, 2, 6, 6).to(torch.int16)
    padded = nn.functional.pad(x, (4,) * 4)
    for image, around in zip(data.shifted(x), padded, strict=True):
        windows = around.unfold(1, 6, 1).unfold(2, 6, 1)  # [C, 9, 9, 6, 6]
        same = [
            (windows == w[:, None, None]).all(-1).all(-1).all(0).any()
            for w in (image, image.flip(2))
        ]
        assert any(same)


def test_missing_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu: torch.device) -> None:
    with pytest.raises(data.MissingDataError, match="mnist needs --data, the directory"):
        data.load("mnist", None, cpu)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(data.MissingDataError, match="pip install torchvision"):
        data.load("mnist", tmp_path, cpu)

    def absent(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset not found.")

    monkeypatch.setitem(sys.modules, "torchvision", fake_vision({"FashionMNIST": absent}))
    with pytest.raises(data.MissingDataError, match=r"fashion-mnist was not found in .*: Dataset"):
        data.load("fashion-mnist", tmp_path, cpu)


def test_the_command_tells_what_is_missing(tmp_path: Path, capsys: Any) -> None:
    found = str(tmp_path / "found.json")
    assert command.main(["--nets", "mlp", "--methods", "mp", "--out", found]) == 1
    assert "mnist needs --data" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
