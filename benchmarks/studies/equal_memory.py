"""Asks: which way of training has the lowest loss for given bytes of training state, and for given time?

A budget is what a dense model of a given width needs with AdamW in fp32: weights, gradients, moments. Against it stand
dense models with the optimizers that people use to save memory, and sparse models with single weights, each as wide as
fits, three layers deep; bytes are counted from tensors. All read the same text: 512 bytes a step in windows of 256.
Peak rates are factors of .106 / (d · width) for linear layers, tried by twos until a lower and a higher one are worse,
in one seed at the shorter length; at the longer length half the best is tried too. Embeddings and norms have .004.
Sparse AdamW runs move their topology as the defaults do; those with SCALE, whose weights have no age, are static.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies import rates
from benchmarks.studies.case import Case
from benchmarks.studies.contestants import CONTESTANTS, MODELS, REFERENCE, Fitted, case_of, fit, peaks, read
from benchmarks.studies.rates import Search
from benchmarks.studies.records import Records
from benchmarks.studies.scale import Scale
from benchmarks.studies.step_costs import step_costs

NAME = "equal_memory"
MEASURED = "equal_memory_measured.json"
LONG = ("dense, AdamW, fp32", "dense, AdamW, bf16", "dense, 8-bit AdamW, bf16", "dense, SCALE, bf16",
        "d 0.25, AdamW, bf16", "d 0.25, 8-bit AdamW, bf16", "d 0.5, SCALE, bf16")  # fmt: skip
FEW = ("dense, AdamW, fp32", "dense, 8-bit AdamW, bf16", "dense, SCALE, bf16",
       "d 0.25, AdamW, bf16", "d 0.5, SCALE, bf16")  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """Describes runs of one budget and length. Turns are made in order; ``place`` is the length's in the scale."""

    budget: int
    place: int
    names: tuple[str, ...]


def turns(scale: Scale) -> list[Turn]:
    """Returns the turns, those that say most first."""
    plan = [(0, 0, LONG), (0, 0, tuple(CONTESTANTS)), (0, 1, LONG), (1, 0, LONG), (1, 1, FEW), (2, 0, FEW)]
    return [Turn(scale.budgets[budget], *rest) for budget, *rest in plan if budget < len(scale.budgets)]


def tables(scale: Scale) -> list[Turn]:
    """Returns a turn for each budget and length, with all contestants that it has."""
    return list({(turn.budget, turn.place): turn for turn in turns(scale)}.values())


def prepare(scale: Scale, folder: Path) -> None:
    fit(scale, folder, {turn.budget: turn.names for turn in tables(scale) if turn.place == 0})


def models(folder: Path) -> dict[tuple[int, str], Fitted]:
    """Returns the models that were found to fit, by budget and contestant."""
    return {(each.budget, each.name): each for each in read(folder / MODELS)}


def cases(scale: Scale, folder: Path) -> list[Case]:
    """Returns the runs that can be named by now: seeds follow rates, and a turn follows the one before."""
    records, fitted = Records(folder / f"{NAME}.jsonl"), models(folder)
    found: list[Case] = []
    for turn in turns(scale):
        rivals = [fitted[turn.budget, name] for name in turn.names if (turn.budget, name) in fitted]
        searches = [search(scale, rival, turn.place, records) for rival in rivals]
        found += [case for each in searches for case in each.cases]
        chosen = [
            case_of(rival.shape, rival.name, scale.memory_steps[turn.place], each.best, seed)
            for seed in scale.seeds
            for rival, each in zip(rivals, searches, strict=True)
            if each.best is not None
        ]
        found += chosen
        if any(case.key not in records for case in found):
            break
    return list(dict.fromkeys(found))


def search(scale: Scale, rival: Fitted, place: int, records: Records) -> Search:
    """Looks for the best rate in the first seed: both ways at the first length, downwards from there at others."""

    def case_at(factor: float) -> Case:
        return case_of(rival.shape, rival.name, scale.memory_steps[place], factor, scale.seeds[0])

    if place == 0:
        return rates.search(case_at, records)
    before = search(scale, rival, place - 1, records)
    if before.best is None:
        return Search((), None)
    return rates.search(case_at, records, (before.best / 2, before.best), upwards=False)


def losses(scale: Scale, rival: Fitted, place: int, records: Records) -> dict[int, float]:
    """Returns the losses at the best rate by seed, of the seeds that ended."""
    best, steps = search(scale, rival, place, records).best, scale.memory_steps[place]
    if best is None:
        return {}
    return rates.losses([case_of(rival.shape, rival.name, steps, best, seed) for seed in scale.seeds], records)


def measure(scale: Scale, folder: Path) -> None:
    """Measures what only the page needs, of every model: its peaks, and its step's time in one thread.

    Times are those of compiled steps, by turns with the dense model that sets the budget, over that model's.
    """
    found = measured(folder)
    for budget in scale.budgets:
        rivals = [each for (its_budget, _), each in models(folder).items() if its_budget == budget]
        if {rival.name for rival in rivals} <= found.get(str(budget), {}).keys():
            continue
        rivals.sort(key=lambda rival: rival.name != REFERENCE)
        costs = step_costs([case_of(rival.shape, rival.name, 1) for rival in rivals], scale.eager)
        found[str(budget)] = {
            rival.name: {"cost": cost, "peaks": peaks(rival)} for rival, cost in zip(rivals, costs, strict=True)
        }
        (folder / MEASURED).write_text(json.dumps(found, indent=1) + "\n")


def measured(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns by budget and contestant its "cost", a step's time, and its "peaks"; nothing where they are missing."""
    path = folder / MEASURED
    return json.loads(path.read_text()) if path.exists() else {}
