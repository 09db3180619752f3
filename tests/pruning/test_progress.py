# SPDX-License-Identifier: MIT
"""prune and scores tell how far each step is; a listener's error leaves the model as it was."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.progress import Progress, Step

BYTES = 4  # of a float32 weight


class Tied(nn.Module):
    """Two roles of one weight, and a layer between them: 5 * 5 + 5 * 5 + 2 * 5 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.twice, self.once, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.once(self.twice(x).relu()).relu()))


def steps_of(seen: list[Progress]) -> list[tuple[str, int]]:
    """(step, weights that it read) of each step; each one adds up and ends with all of it."""
    found = []
    for (step, total), group in groupby(seen, key=lambda x: (x.step, x.total)):
        done = [x.done for x in group]
        assert sorted(set(done)) == done and done[-1] == total
        found.append((step, total // BYTES))
    return found


MEASURE, RANK = ("measure", 60), ("rank", 60)  # norms of each layer, tied or not; a mask of each
ORDERS: list[tuple[dict[str, Any], list[tuple[str, int]]]] = [
    ({}, [MEASURE, RANK]),
    ({"criterion": "magnitude"}, [RANK]),
    ({"criterion": "random", "scope": "global", "normalize": "none"}, [RANK]),
    ({"rounds": 2}, [MEASURE, RANK] * 2),
    ({"scope": "global"}, [MEASURE, RANK]),
    ({"scope": "global", "normalize": "none"}, [MEASURE, RANK]),
    ({"scope": "global", "rounds": 2, "normalize": "norm"}, [MEASURE, RANK] * 2),
    ({"order": "forward"}, [MEASURE, RANK]),
    # once more in the second round: all that was pruned since it was last measured (head, the last
    # of the first round; the others were measured again by the layers after them)
    ({"order": "forward", "rounds": 2}, [MEASURE, RANK, ("measure", 10), RANK]),
    ({"order": "backward", "rounds": 2}, [MEASURE, RANK, ("measure", 25), RANK]),
    ({"exclude": ["once"]}, [MEASURE, ("rank", 35)]),
    ({"exclude": ["once"], "rounds": 2}, [MEASURE, ("rank", 35), ("measure", 35), ("rank", 35)]),
]


@pytest.mark.parametrize(("options", "steps"), ORDERS, ids=lambda x: str(x)[:60])
def test_steps_of_prune(options: dict[str, Any], steps: list[tuple[str, int]]) -> None:
    seen: list[Progress] = []
    net = Tied()
    result = lap_ext.prune(net, torch.ones(1, 5), 0.5, on_progress=seen.append, **options)
    assert steps_of(seen) == steps
    silent = lap_ext.prune(Tied(), torch.ones(1, 5), 0.5, **options)
    assert all(torch.equal(mask, silent.masks[name]) for name, mask in result.masks.items())
    assert {x.name for x in seen if x.step == "rank"} <= {"twice", "once", "head", ""}


def test_steps_of_scores() -> None:
    seen: list[Progress] = []
    found = lap_ext.scores(Tied(), torch.ones(1, 5), on_progress=seen.append)
    assert [(x.step, x.name, x.done // BYTES) for x in seen] == [
        ("measure", "twice", 25),
        ("measure", "once", 50),
        ("measure", "head", 60),
        ("score", "twice", 25),
        ("score", "once", 50),
        ("score", "head", 60),
    ]
    silent = lap_ext.scores(Tied(), torch.ones(1, 5))
    assert all(torch.equal(scores, silent[name]) for name, scores in found.items())


def test_data_has_no_known_length() -> None:
    seen: list[Progress] = []
    lap_ext.scores(
        Tied(), torch.ones(1, 5), "lookahead_act", data=[torch.ones(2, 5)], on_progress=seen.append
    )
    assert seen[0] == Progress("data", "", 0, 0)
    assert steps_of(seen[1:]) == [MEASURE, ("score", 60)]


def test_a_step_without_a_listener() -> None:
    step = Step(None, "rank", 4)
    step.read("a", 3)
    assert (step.done, step.total) == (3, 4)


@pytest.mark.parametrize("order", ["parallel", "backward"])
@pytest.mark.parametrize("step", ["measure", "rank"])
def test_an_error_of_the_listener_changes_nothing(order: str, step: str) -> None:
    net = Tied()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def stop(progress: Progress) -> None:
        if progress.step == step and progress.done == progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lap_ext.prune(net, torch.ones(1, 5), 0.5, order=order, on_progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
