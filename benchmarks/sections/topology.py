"""Measures a topology update of a whole model against one of its training steps."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

import smet_compile as smet
from benchmarks.layer import SINGLE, Block, name_of
from benchmarks.ratios import Clock
from benchmarks.sections.step import BLOCK, QUICK_SHAPE, SHAPE
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, at_most
from benchmarks.training import DENSE, FUSED, Recipe, Training, static_shapes, training

TARGETS = {"random": at_most(0.3), "gradient": at_most(0.5)}
WARMUP = 2
NOTE = (
    'The model and step of the section "Training step", fused update. Every second step ends in a topology update, '
    "which drops and grows 20% of all active blocks. The ratio is the whole cost of an update over a dense step, timed "
    "in the same turn: the manager's call and, where gradients decide what grows, by how much longer the step takes "
    "that scores them. An update every 100 steps costs a hundredth of it for each step. Scores come of a dense "
    "gradient: with tiles, of products that the other steps leave out, (1 - d) / 3d of the operations that these do "
    "with the same weights."
)


def tables(settings: Settings) -> list[Table]:
    clock = Clock(settings.device)
    with static_shapes():
        rows = [_row(block, grow, settings, clock) for block in (BLOCK, SINGLE) for grow in TARGETS]
    return [Table("Topology update", "update / dense step", NOTE, rows)]


def _row(block: Block, grow: str, settings: Settings, clock: Clock) -> Row:
    shape = settings.size(SHAPE, QUICK_SHAPE)
    dense = training(Recipe(DENSE, shape, 0, torch.float32, settings.device))
    run = training(Recipe(FUSED, shape, block, torch.float32, settings.device))
    manager = smet.TopologyManager(
        run.model, run.optimizer, auto_step=False, total_steps=10**6, every=2, grow=grow, schedule="cosine"
    )
    turns = [_turn(dense, run, manager, clock) for _ in range(WARMUP + settings.repeats)][WARMUP:]
    scoring = [turn.scored - turn.plain if grow == "gradient" else 0.0 for turn in turns]
    costs = [scored + turn.update for scored, turn in zip(scoring, turns, strict=True)]
    ratios = [cost / turn.dense for cost, turn in zip(costs, turns, strict=True)]
    of_own_step = statistics.median(cost / turn.plain for cost, turn in zip(costs, turns, strict=True))
    dense_s, plain, _, update = (statistics.median(column) for column in zip(*turns, strict=True))
    more = {
        "update / step": f"{of_own_step:.2f}",
        "dense step, ms": f"{1e3 * dense_s:.0f}",
        "step, ms": f"{1e3 * plain:.0f}",
        "manager's call, ms": f"{1e3 * update:.0f}",
        "scoring, ms": f"{1e3 * statistics.median(scoring):.0f}",
    }
    return Row(f"{name_of(block)}, grow by {grow}", run.kernels, ratios, TARGETS[grow], more)


class _Turn(NamedTuple):
    """Holds the seconds of a dense step, of a step without an update, of one with, and of the manager's call."""

    dense: float
    plain: float
    scored: float
    update: float


def _turn(dense: Training, run: Training, manager: smet.TopologyManager, clock: Clock) -> _Turn:
    dense_s, plain = clock.seconds(dense.step), clock.seconds(run.step)
    assert manager.step() is None
    scored = clock.seconds(run.step)
    update = clock.seconds(manager.step)
    assert manager.num_steps == manager.history[-1].step
    return _Turn(dense_s, plain, scored, update)
