# SPDX-License-Identifier: MIT
"""The order of things: seeds outside, then nets, methods, levels; finished cells are skipped.

    one-shot    every level prunes the dense net of the seed at once
    iterative   every step prunes the net of the step before by its ratios, masks carried over, and
                fine-tunes it; the levels are steps of one chain, which is repeated as a whole

The dense net of a seed is trained once and kept in a directory; a later run loads it from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import lap_ext
from benchmarks import report
from benchmarks.checks import WrongResultError
from benchmarks.paper.data import Data
from benchmarks.paper.methods import METHODS, masks_of
from benchmarks.paper.settings import BATCH, SETTINGS, Setting
from benchmarks.paper.store import Cell, Key, Store
from benchmarks.paper.training import accuracy, train

DENSE = "dense"
TUNE_SEED = 1_000_000  # added to the seed: other batches than in training, the same for all methods
ONE_SHOT, ITERATIVE = "one-shot", "iterative"

Masks = Mapping[str, Tensor]
OnStep = Callable[[str, int], object]  # text, training steps done


@dataclass(frozen=True)
class Plan:
    """What to run. None: what the setting of the net says."""

    nets: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    levels: tuple[int, ...] | None = None
    dataset: str | None = None
    schedule: str = ONE_SHOT
    train_steps: int | None = None
    tune_steps: int | None = None
    batches: int = 100  # for methods that look at data
    checkpoints: Path = Path("build/paper")
    device: str = "cpu"

    def dense(self, net: str, seed: int) -> Key:
        """Returns the cell of the dense net."""
        setting = SETTINGS[net]
        return Key(
            net,
            self.dataset or setting.datasets[0],
            seed,
            DENSE,
            0,
            "",
            setting.train_steps if self.train_steps is None else self.train_steps,
            0,
            0,
        )

    def checkpoint(self, dense: Key) -> Path:
        """Returns the file that keeps the dense weights."""
        name = f"{dense.net}-{dense.dataset}-seed{dense.seed}-{dense.train_steps}.pt"
        return self.checkpoints / name

    def levels_of(self, net: str) -> tuple[int, ...]:
        """Returns the levels of a net."""
        return self.levels or SETTINGS[net].levels

    def methods_of(self, net: str) -> list[str]:
        """Returns the methods that suit a net."""
        return [name for name in self.methods if METHODS[name].suits(SETTINGS[net])]

    def cells(self, net: str, seed: int) -> list[Key]:
        """Returns all cells of one dense net."""
        dense = self.dense(net, seed)
        steps = SETTINGS[net].tune_steps if self.tune_steps is None else self.tune_steps
        pruned = partial(replace, dense, schedule=self.schedule, tune_steps=steps)
        return [dense] + [
            pruned(method=method, level=level, batches=self.batches * METHODS[method].data)
            for method in self.methods_of(net)
            for level in self.levels_of(net)
        ]

    def groups(self) -> Iterator[list[Key]]:
        """Yields the cells in the order of the run, one dense net after the other."""
        for seed in self.seeds:
            for net in self.nets:
                yield self.cells(net, seed)

    def keys(self) -> list[Key]:
        """Returns all cells."""
        return [key for group in self.groups() for key in group]


def steps_left(plan: Plan, store: Store) -> int:
    """Counts the training steps that are still to be done."""
    total = 0
    for group in plan.groups():
        missing = store.missing(group)
        if missing:
            total += sum(count for _, count in _work(plan, group[0], missing))
    return total


def run(
    plan: Plan,
    store: Store,
    load: Callable[[str], Data],
    on_step: OnStep = lambda text, steps: None,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Runs what is not finished.

    Args:
        plan: what to run.
        store: takes each cell as soon as it is finished.
        load: name of a data set -> the data.
        on_step: is called as training goes on.
        say: is told when all cells of a dense net are finished.
    """
    loaded: dict[str, Data] = {}
    for group in plan.groups():
        missing = store.missing(group)
        if not missing:
            continue
        key = group[0]
        if key.dataset not in loaded:
            loaded[key.dataset] = load(key.dataset)
        _Trial(plan, key, loaded[key.dataset], store, on_step).run(missing)
        say(f"{key.net}, seed {key.seed}: {len(missing)} cells")


def _work(plan: Plan, dense: Key, missing: list[Key]) -> Iterator[tuple[str, int]]:
    """Yields (what, training steps) of the missing cells of one dense net."""
    if not plan.checkpoint(dense).exists():
        yield DENSE, dense.train_steps
    levels: dict[str, list[Key]] = {}
    for key in missing:
        if key.method != DENSE:
            levels.setdefault(key.method, []).append(key)
    for method, keys in levels.items():
        rounds = len(keys) if plan.schedule == ONE_SHOT else max(key.level for key in keys)
        yield method, rounds * keys[0].tune_steps


class _Trial:
    """One dense net and all that is pruned from it."""

    def __init__(self, plan: Plan, key: Key, data: Data, store: Store, on_step: OnStep) -> None:
        self.plan, self.key, self.data, self.store = plan, key, data, store
        self.on_step = on_step
        self.setting: Setting = SETTINGS[key.net]
        torch.manual_seed(key.seed)
        self.net: nn.Module = self.setting.net().to(plan.device)
        self.net.eval()
        self.topology = lap_ext.trace(self.net, data.example())
        self.weights = self._trained()

    def run(self, missing: list[Key]) -> None:
        """Runs the missing cells of this net."""
        if self.key in missing:
            self.net.load_state_dict(self.weights)
            found = accuracy(self.net, self.data)
            self.store.add(Cell(self.key, 100.0, found, found, 0.0, 0.0))
        pruned = [key for key in missing if key.method != DENSE]
        if self.plan.schedule == ONE_SHOT:
            for key in pruned:
                self.net.load_state_dict(self.weights)
                self.store.add(self._cell(key, None)[0])
            return
        for method in dict.fromkeys(key.method for key in pruned):
            self._chain([key for key in pruned if key.method == method])

    def _chain(self, keys: list[Key]) -> None:
        """Runs one method step by step up to the highest level."""
        wanted = {key.level: key for key in keys}
        self.net.load_state_dict(self.weights)
        masks: Masks | None = None
        for level in range(1, max(wanted) + 1):
            cell, masks = self._cell(replace(keys[0], level=level), masks)
            if level in wanted:
                self.store.add(cell)

    def _cell(self, key: Key, masks: Masks | None) -> tuple[Cell, Masks]:
        """Prunes and fine-tunes the net as it is."""
        method = METHODS[key.method]
        begin = time.perf_counter()
        found = masks_of(
            self.topology,
            self.setting,
            method,
            key.level,
            self.data,
            key.batches,
            key.seed,
            masks,
        )
        prune_s = time.perf_counter() - begin
        pruned = accuracy(self.net, self.data)
        begin = time.perf_counter()
        kept = self._kept(key, found)
        text = f"{key.net}, seed {key.seed}: {kept:.2f} %, {method.name}"
        self._train(key.tune_steps, key.seed + TUNE_SEED, text, found)
        tune_s = time.perf_counter() - begin
        cell = Cell(key, kept, pruned, accuracy(self.net, self.data), prune_s, tune_s)
        return cell, found

    def _kept(self, key: Key, masks: Masks) -> float:
        """Returns the per cent kept; raises unless every other method keeps as many."""
        count = sum(int(mask.sum()) for mask in masks.values())
        planned, _ = self.setting.kept(self.net, key.level)
        if count != planned:
            raise WrongResultError(f"{key}: expected {planned} weights to be kept, got {count}")
        return self.setting.kept_per_cent(self.net, key.level)

    def _train(self, steps: int, seed: int, text: str, masks: Masks | None = None) -> None:
        step = partial(self.on_step, text, 1)
        train(self.net, self.data, steps, self.setting.rate, BATCH, seed, masks, step)

    def _trained(self) -> dict[str, Tensor]:
        """Returns the weights of the dense net, from its file if there is one."""
        path = self.plan.checkpoint(self.key)
        if path.exists():
            return dict(torch.load(path, map_location=self.plan.device, weights_only=True))
        self._train(self.key.train_steps, self.key.seed, f"{self.key.net}, seed {self.key.seed}")
        weights = {name: value.clone() for name, value in self.net.state_dict().items()}
        report.replace(path, partial(torch.save, weights))
        return weights
