"""Looks for the best rate of a run by factors of two, until a lower and a higher one are worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.studies.case import Case
from benchmarks.studies.records import Records

FACTORS = (0.5, 1.0, 2.0)
MOST_FACTORS = 6


@dataclass(frozen=True)
class Search:
    """Holds the runs that look for a rate, and the best factor, None where runs are missing.

    ``inside``: whether a lower and a higher rate are worse. ``highest``: of the factors that were tried.
    """

    cases: tuple[Case, ...]
    best: float | None
    inside: bool = False
    highest: float = math.inf


def search(
    case_at: Callable[[float], Case], records: Records, factors: Sequence[float] = FACTORS, upwards: bool = True
) -> Search:
    """Tries the factors, and more beyond the best one for as long as that is at an end of those that were tried.

    ``case_at`` returns the run at a factor. ``upwards``: whether factors above the given ones are tried.
    """
    tried = {factor: case_at(factor) for factor in factors}
    while all(case.key in records for case in tried.values()):
        best = min(sorted(tried), key=lambda factor: _loss(records, tried[factor]))
        beyond = best / 2 if best == min(tried) else best * 2 if best == max(tried) and upwards else None
        if beyond is None or len(tried) == MOST_FACTORS:
            return Search(tuple(tried.values()), best, beyond is None, max(tried))
        tried[beyond] = case_at(beyond)
    return Search(tuple(tried.values()), None)


def losses(cases: Sequence[Case], records: Records) -> dict[int, float]:
    """Returns the losses by seed, of the runs that ended with one."""
    ended = [records[case.key] for case in cases if case.key in records]
    return {record["case"]["seed"]: record["loss"] for record in ended if record["loss"] is not None}


def _loss(records: Records, case: Case) -> float:
    loss = records[case.key]["loss"]
    return math.inf if loss is None else loss
