"""Computes means with 95% confidence intervals, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95% quantiles by degrees of freedom; beyond, 1.96 + 2.372 / df + 2.82 / df² is right to 0.001.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """Holds a mean of ``num`` numbers and the half-width of its interval, which is infinite for a single number."""

    mean: float
    half: float
    num: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def format(self, digits: int = 4, sign: bool = True) -> str:
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if math.isinf(self.half) else f"{mean} ± {self.half:.{digits}f}"


def interval(numbers: Sequence[float]) -> Interval:
    """Returns the interval of independent numbers, or of differences of pairs."""
    mean, num = statistics.fmean(numbers), len(numbers)
    if num < 2:
        return Interval(mean, math.inf, num)
    freedom = num - 1
    quantile = _QUANTILES[freedom - 1] if freedom <= len(_QUANTILES) else 1.96 + 2.372 / freedom + 2.82 / freedom**2
    return Interval(mean, quantile * statistics.stdev(numbers) / math.sqrt(num), num)


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Returns the interval of the differences over the seeds that both have; None where there is none."""
    seeds = sorted(ours.keys() & others.keys())
    return interval([ours[seed] - others[seed] for seed in seeds]) if seeds else None


def bold(value: Interval | None, digits: int = 4) -> str:
    """Writes a difference, in bold where its interval excludes zero; a dash where there is none."""
    if value is None:
        return "—"
    return f"**{value.format(digits)}**" if value.excludes_zero else value.format(digits)
