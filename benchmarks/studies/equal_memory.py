"""Asks: is a wide sparse model better than a dense one, at equal bytes of training state?

A budget is what a dense model of a given width needs: weights, gradients, moments. Against it stand dense models of
other depths that fit, and for each density the widest sparse model whose weights, gradients, moments, ages and index
fit. Narrow models want higher rates than the wide one that rates were tuned on: dense ones are tried at three, sparse
ones at two, and the best counts. All are compared after the same tokens; and after the time that the dense model took,
by step times measured side by side (`equal_memory_times.json`), each with a schedule of that length. The tables are of
seed 0, and dense rates of the small budget are at the edge of what was tried. No model reads more than four bytes of
text for each weight: with so little, what a model can hold does not count, so this says nothing of longer training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

import smet_compile as smet
from benchmarks.ratios import Clock, in_turns
from benchmarks.studies.case import Case, Shape
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import RATE, tuned

NAME = "equal_memory"
TIMES = "equal_memory_times.json"
DENSITIES = (0.5, 0.25, 0.1)
BLOCKS = ("1", "32")
DEPTHS = (2 / 3, 1, 4 / 3)  # of dense models, over that of the model which sets the budget
RATES = (RATE, 2 * RATE)
DENSE_RATES = (*RATES, 4 * RATE)
_WIDTH_STEP = 16
_REPEATS = 7


@dataclass(frozen=True)
class Candidate:
    """Describes a model that fits the budget of a dense model of width ``budget``, and its bytes."""

    budget: int
    density: float
    block: str
    shape: Shape
    num_bytes: int

    @property
    def name(self) -> str:
        return f"{self.density} {self.block} {self.shape.hidden}x{self.shape.layers}"


def shape_of(scale: Scale, hidden: int, layers: int) -> Shape:
    return replace(scale.large, hidden=hidden, intermediate=5 * hidden // 2, layers=layers)


@lru_cache
def training_bytes(shape: Shape, density: float, block: str) -> int:
    """Counts the bytes of weights, gradients, moments, ages and index, as the planner does."""
    from benchmarks.studies.trainer import build_model

    case = tuned(shape, 1, density, block, 0)
    model = build_model(case, "meta")
    given = {"block_shape": case.block_shape, "batch": 1, "sequence": shape.sequence, "compiled": False}
    found = smet.plan(model, 0.5, **given).dense if density == 1 else smet.plan(model, density, **given).sparse
    return sum(number for kind, number in found.stored.items() if kind != "buffers")


@lru_cache
def candidates(scale: Scale) -> tuple[Candidate, ...]:
    found = []
    for budget in scale.budgets:
        limit = training_bytes(shape_of(scale, budget, scale.large.layers), 1.0, "1")
        depths = {round(scale.large.layers * depth) for depth in DEPTHS}
        kinds = [(1.0, "1", layers) for layers in sorted(depths)]
        kinds += [(density, block, scale.large.layers) for block in BLOCKS for density in DENSITIES]
        found += [_widest(scale, budget, limit, *kind) for kind in kinds]
    return tuple(found)


def _widest(scale: Scale, budget: int, limit: int, density: float, block: str, layers: int) -> Candidate:
    """Finds the widest model within the limit by bisection, since bytes grow with the width."""
    low, high = 1, scale.widest // _WIDTH_STEP
    while high - low > 1:
        middle = (low + high) // 2
        fits = training_bytes(shape_of(scale, middle * _WIDTH_STEP, layers), density, block) <= limit
        low, high = (middle, high) if fits else (low, middle)
    shape = shape_of(scale, low * _WIDTH_STEP, layers)
    return Candidate(budget, density, block, shape, training_bytes(shape, density, block))


def measure_times(scale: Scale, path: Path) -> None:
    """Measures a compiled step of every candidate, by turns with the dense model that sets its budget."""
    from benchmarks.studies.trainer import build, compiled, two_calls

    times: dict[str, dict[str, float]] = {}
    clock = Clock(torch.device(scale.large.device))
    torch.set_num_threads(1)
    for budget in scale.budgets:
        rivals = [c for c in candidates(scale) if c.budget == budget]
        rivals.sort(key=lambda c: (c.density != 1, c.shape.layers != scale.large.layers))
        works = []
        for rival in rivals:
            tokens = torch.randint(256, (rival.shape.batch, rival.shape.sequence), device=rival.shape.device)
            trainee = build(tuned(rival.shape, 1, rival.density, rival.block, 0))
            step = two_calls(trainee.model, trainee.optimizer) if scale.eager else compiled(trainee)
            works.append(lambda step=step, tokens=tokens: step({"input_ids": tokens, "labels": tokens}))
        pairs = in_turns(works[0], works[1:], _REPEATS, clock, warmup=3)
        times[str(budget)] = {rivals[0].name: 1.0} | {
            rival.name: sorted(pair.costs)[_REPEATS // 2] for rival, pair in zip(rivals[1:], pairs, strict=True)
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(times, indent=1) + "\n")


def prepare(scale: Scale, folder: Path) -> None:
    if not (folder / TIMES).exists():
        measure_times(scale, folder / TIMES)


def times(folder: Path) -> dict[str, dict[str, float]]:
    """Returns by budget and candidate the time of a step over that of the dense model that sets the budget."""
    return json.loads((folder / TIMES).read_text())


def same_tokens(scale: Scale, candidate: Candidate, seed: int) -> list[Case]:
    rates = DENSE_RATES if candidate.density == 1 else RATES
    return [_run(scale.memory_steps, candidate, rate, seed) for rate in rates]


def same_time(scale: Scale, candidate: Candidate, cost: float, seed: int) -> list[Case]:
    """Returns runs as long in time; ``cost`` is a step's time over that of the dense model that sets the budget."""
    steps = round(scale.memory_steps / cost)
    return [_run(steps, candidate, case.rate, seed) for case in same_tokens(scale, candidate, seed)]


def _run(steps: int, candidate: Candidate, rate: float, seed: int) -> Case:
    return tuned(candidate.shape, steps, candidate.density, candidate.block, seed, rate=rate)


def is_main(scale: Scale, candidate: Candidate) -> bool:
    """Tells whether it is run with every seed: the dense model of the budget, and single weights at density .25."""
    is_budget = candidate.density == 1 and candidate.shape.layers == scale.large.layers
    return is_budget or (candidate.density == 0.25 and candidate.block == "1")


def cases(scale: Scale, folder: Path) -> list[Case]:
    measured = times(folder)
    found = []
    for seed in scale.seeds:
        for candidate in candidates(scale):
            cost = measured[str(candidate.budget)][candidate.name]
            if seed == scale.seeds[0]:
                found += same_tokens(scale, candidate, seed) + same_time(scale, candidate, cost, seed)
            elif is_main(scale, candidate):
                found += same_tokens(scale, candidate, seed)
    return found
