"""Measures a topology update of a whole model against one of its training steps."""

from __future__ import annotations

import statistics

import torch

import smet_compile as smet
from benchmarks.ratios import Clock
from benchmarks.sections.step import BLOCK, QUICK_SHAPE, SHAPE
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, at_most
from benchmarks.training import FUSED, Recipe, Training, static_shapes, training

TARGET = at_most(0.3)
WARMUP = 2
NOTE = (
    'The model and step of the section "Training step", fused update. Every second step ends in a topology update, '
    "which drops and grows 20% of all active blocks. The ratio is the whole cost of an update over a step without: the "
    "manager's call and, where gradients decide what grows, by how much longer the step takes that scores them. An "
    "update every 100 steps costs a hundredth of it for each step. Scores come of a dense gradient: with tiles, "
    "of products that the other steps leave out, (1 - d) / 3d of the operations that these do with the same weights."
)


def tables(settings: Settings) -> list[Table]:
    clock = Clock(settings.device)
    with static_shapes():
        rows = [_row(block, grow, settings, clock) for block in (BLOCK, 1) for grow in ("random", "gradient")]
    return [Table("Topology update", "update / step", NOTE, rows)]


def _row(block: int, grow: str, settings: Settings, clock: Clock) -> Row:
    shape = settings.size(SHAPE, QUICK_SHAPE)
    run = training(Recipe(FUSED, shape, block, torch.float32, settings.device))
    manager = smet.TopologyManager(run.model, run.optimizer, total_steps=10**6, every=2, grow=grow)
    rounds = [_round(run, manager, clock) for _ in range(WARMUP + settings.repeats)][WARMUP:]
    scoring = [watched - plain if grow == "gradient" else 0.0 for plain, watched, _ in rounds]
    ratios = [(scored + update) / plain for scored, (plain, _, update) in zip(scoring, rounds, strict=True)]
    plain, _, update = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
    more = {
        "step, ms": f"{plain:.0f}",
        "manager's call, ms": f"{update:.0f}",
        "scoring, ms": f"{1e3 * statistics.median(scoring):.0f}",
    }
    name = "single weights" if block == 1 else f"{block} tiles"
    return Row(f"{name}, grow by {grow}", run.kernels, ratios, TARGET, more)


def _round(run: Training, manager: smet.TopologyManager, clock: Clock) -> tuple[float, float, float]:
    """Seconds of a step without an update, of one with, and of the manager's call after it."""
    plain = clock.seconds(run.step)
    assert manager.step() is None
    watched = clock.seconds(run.step)
    update = clock.seconds(manager.step)
    assert manager.num_steps == manager.history[-1].step
    return plain, watched, update
