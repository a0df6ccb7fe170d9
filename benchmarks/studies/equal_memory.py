"""Asks: which way of training has the lowest loss for given bytes of training state, and for given time?

A budget is what a dense model of a given width needs with AdamW in fp32: weights, gradients, moments. Against it stand
dense models with the optimizers that people use to save memory, and sparse models with single weights, each as wide as
fits, three layers deep; bytes are counted from tensors. All read the same text: 512 bytes a step in windows of 256.
Peak rates are factors of .106 / (d · width) for linear layers, and then of .004 for all other parameters. Each is tried
by twos until a lower and a higher one are worse, in one seed at the shorter length; the larger budget takes the second
from the smaller. At the longer length half the first is tried too. Contestants that run there have five seeds, others
three. In the larger budget two run: dense AdamW in bf16 and the best sparse one. Sparse AdamW runs move their topology
as the defaults do; those with SCALE, whose weights have no age, are static.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.studies import rates
from benchmarks.studies.case import Case
from benchmarks.studies.contestants import (
    CONTESTANTS,
    MODELS,
    REFERENCE,
    Factors,
    Fitted,
    case_of,
    fit,
    peaks,
    read,
    shape_of,
)
from benchmarks.studies.rates import Search
from benchmarks.studies.records import Records
from benchmarks.studies.scale import Scale
from benchmarks.studies.step_costs import step_costs

NAME = "equal_memory"
MEASURED = "equal_memory_measured.json"
LONG = ("dense, AdamW, fp32", "dense, AdamW, bf16", "dense, 8-bit AdamW, bf16",
        "d 0.25, AdamW, bf16", "d 0.25, 8-bit AdamW, bf16")  # fmt: skip
BEST = ("dense, AdamW, bf16", "d 0.25, 8-bit AdamW, bf16")
FIRST = (*LONG, "dense, SCALE, bf16", "d 0.5, SCALE, bf16")


@dataclass(frozen=True)
class Turn:
    """Describes runs of one budget and length. Turns are made in order; ``place`` is the length's in the scale."""

    budget: int
    place: int
    names: tuple[str, ...]


def turns(scale: Scale) -> list[Turn]:
    """Returns the turns, those that say most first."""
    plan = [(0, 0, FIRST), (0, 1, LONG), (0, 0, tuple(CONTESTANTS)), (1, 0, BEST)]
    return [Turn(scale.budgets[budget], *rest) for budget, *rest in plan if budget < len(scale.budgets)]


def tables(scale: Scale) -> list[Turn]:
    """Returns a turn for each budget and length, with all contestants that it has."""
    of_tables = {(turn.budget, turn.place): turn for turn in turns(scale)}
    return [of_tables[table] for table in sorted(of_tables)]


def prepare(scale: Scale, folder: Path) -> None:
    fit(scale, folder, {turn.budget: turn.names for turn in tables(scale) if turn.place == 0})


def models(folder: Path) -> dict[tuple[int, str], Fitted]:
    """Returns the models that were found to fit, by budget and contestant."""
    return {(each.budget, each.name): each for each in read(folder / MODELS)}


@dataclass(frozen=True)
class Found:
    """Holds the runs that look for the rates of a contestant.

    Args:
        best: the best factors, None where runs are missing.
        linear, plain: the searches of each, None where it was not made.
    """

    cases: tuple[Case, ...]
    best: Factors | None
    linear: Search | None = None
    plain: Search | None = None


@dataclass(frozen=True)
class Results:
    """Reads rates and losses from the runs that ended. ``models``: by budget and contestant."""

    scale: Scale
    records: Records
    models: dict[tuple[int, str], Fitted]

    @classmethod
    def read(cls, scale: Scale, folder: Path) -> Results:
        return cls(scale, Records(folder / f"{NAME}.jsonl"), models(folder))

    def rivals(self, turn: Turn) -> list[Fitted]:
        """Returns the models of a turn, those that are known."""
        return [self.models[turn.budget, name] for name in turn.names if (turn.budget, name) in self.models]

    def search(self, rival: Fitted, place: int) -> Found:
        """Looks for the best rates in the first seed: both ways at the first length, downwards from there at others."""
        if place > 0:
            before = self.search(rival, place - 1).best
            return Found((), None) if before is None else self._search_lower(rival, place, before)
        smallest = self.models.get((self.scale.budgets[0], rival.name), rival)
        if smallest == rival:
            return self._search_both(rival)
        known = self.search(smallest, 0).best
        return Found((), None) if known is None else self._search_linear(rival, known.plain)

    def _search_both(self, rival: Fitted) -> Found:
        first = self._search_linear(rival, 1.0)
        if first.best is None:
            return first
        linear = first.best.linear
        plain = rates.search(lambda factor: self._tried(rival, 0, Factors(linear, factor)), self.records)
        best = None if plain.best is None else Factors(linear, plain.best)
        return Found(tuple(dict.fromkeys(first.cases + plain.cases)), best, first.linear, plain)

    def _search_linear(self, rival: Fitted, plain: float) -> Found:
        found = rates.search(lambda factor: self._tried(rival, 0, Factors(factor, plain)), self.records)
        return Found(found.cases, None if found.best is None else Factors(found.best, plain), found)

    def _search_lower(self, rival: Fitted, place: int, before: Factors) -> Found:
        found = rates.search(
            lambda factor: self._tried(rival, place, Factors(factor, before.plain)),
            self.records,
            (before.linear / 2, before.linear),
            upwards=False,
        )
        return Found(found.cases, None if found.best is None else Factors(found.best, before.plain), found)

    def _tried(self, rival: Fitted, place: int, factors: Factors) -> Case:
        return case_of(rival.shape, rival.name, self.scale.memory_steps[place], factors, self.scale.seeds[0])

    def best_runs(self, rival: Fitted, place: int) -> list[Case]:
        """Returns the runs at the best rates, one for each seed; none while the rates are not known."""
        best, steps = self.search(rival, place).best, self.scale.memory_steps[place]
        many = rival.name in LONG and rival.budget == self.scale.budgets[0]
        seeds = self.scale.many_seeds if many else self.scale.seeds
        return [] if best is None else [case_of(rival.shape, rival.name, steps, best, seed) for seed in seeds]

    def losses(self, rival: Fitted, place: int) -> dict[int, float]:
        """Returns the losses at the best rates by seed, of the seeds that ended."""
        return rates.losses(self.best_runs(rival, place), self.records)


def cases(scale: Scale, folder: Path) -> list[Case]:
    """Returns the runs that can be named by now: seeds follow rates, and a turn follows the one before."""
    results = Results.read(scale, folder)
    found: list[Case] = []
    for turn in turns(scale):
        found += _cases_of(turn, results)
        if any(case.key not in results.records for case in found):
            break
    return list(dict.fromkeys(found))


def cases_of_all_turns(scale: Scale, folder: Path) -> list[Case]:
    """Returns the runs of all turns that can be named by now, also those of turns whose time has not come."""
    results = Results.read(scale, folder)
    return list(dict.fromkeys(case for turn in turns(scale) for case in _cases_of(turn, results)))


def _cases_of(turn: Turn, results: Results) -> list[Case]:
    rivals = results.rivals(turn)
    searched = [case for rival in rivals for case in results.search(rival, turn.place).cases]
    by_rival = [results.best_runs(rival, turn.place) for rival in rivals]
    return searched + [case for of_seed in zip_longest(*by_rival) for case in of_seed if case]


def measure(scale: Scale, folder: Path) -> None:
    """Measures what only the page needs, of every model: its peaks, and its step's time in one thread.

    Times are those of compiled steps, by turns with the dense model that sets the budget, over that model's.
    """
    found = measured(folder)
    for budget in scale.budgets:
        rivals = [each for (its_budget, _), each in models(folder).items() if its_budget == budget]
        if {rival.name for rival in rivals} <= found.get(str(budget), {}).keys():
            continue
        first = case_of(shape_of(scale, budget), REFERENCE, 1)
        others = [case for rival in rivals if (case := case_of(rival.shape, rival.name, 1)) != first]
        costs = dict(zip([first, *others], step_costs([first, *others], scale.eager), strict=True))
        found[str(budget)] = {
            rival.name: {"cost": costs[case_of(rival.shape, rival.name, 1)], "peaks": peaks(rival)} for rival in rivals
        }
        (folder / MEASURED).write_text(json.dumps(found, indent=1) + "\n")


def measured(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns by budget and contestant its "cost", a step's time, and its "peaks"; nothing where they are missing."""
    path = folder / MEASURED
    return json.loads(path.read_text()) if path.exists() else {}
