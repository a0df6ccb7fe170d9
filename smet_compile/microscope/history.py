"""What became of blocks over time: ages, churn, survival by birth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smet_compile.ops import Site
from smet_compile.ops.optimizers import optimizer_that_steps
from smet_compile.runtime import TopologyEvent


@dataclass(frozen=True)
class Cohort:
    """The blocks of one weight, or of several, that were grown at one topology update.

    Args:
        born_step: the step of that update; 0: the blocks active from the beginning.
        num_grown: how many they were. num_active: how many of them are active now, never dropped since.
    """

    born_step: int
    num_grown: int
    num_active: int

    @property
    def survival_fraction(self) -> float | None:
        """None of what was never grown, and where the optimizer has joined older cohorts with this one."""
        known = self.num_grown > 0 and self.num_active <= self.num_grown
        return self.num_active / self.num_grown if known else None


@dataclass(frozen=True)
class SiteHistory:
    """One weight over time.

    Args:
        age_counts: age in steps → number of active blocks, exactly; empty where the optimizer keeps no ages.
        churn: (step, dropped over active blocks) for each topology update.
        cohorts: by birth; empty without ages.
        explored_fraction: blocks that were ever active, of all (the in-time over-parameterization rate of Liu et
            al. 2021); None without an update.
    """

    age_counts: dict[int, int]
    churn: tuple[tuple[int, float], ...]
    cohorts: tuple[Cohort, ...]
    explored_fraction: float | None

    @property
    def mean_age(self) -> float | None:
        num_blocks = sum(self.age_counts.values())
        return sum(age * count for age, count in self.age_counts.items()) / num_blocks if num_blocks else None


def history_of(site: Site, optimizer: Any, events: Sequence[TopologyEvent], step: int) -> SiteHistory:
    """``optimizer``: it, or several, or a wrapper. ``step``: how many steps it has taken."""
    own = [(event.step, event.sites[site.name]) for event in events if site.name in event.sites]
    ages = age_counts(site, optimizer)
    grown = {0: site.num_active} | {at: said.num_dropped for at, said in own}
    alive = {step - age: count for age, count in ages.items()}
    cohorts = tuple(Cohort(born, count, alive.get(born, 0)) for born, count in grown.items() if ages)
    return SiteHistory(
        ages,
        tuple((at, said.churn_fraction) for at, said in own),
        cohorts,
        own[-1][1].explored_fraction if own else None,
    )


def age_counts(site: Site, optimizer: Any) -> dict[int, int]:
    """Age in steps → number of active blocks of that age; empty where the optimizer keeps no ages."""
    ages_of = getattr(optimizer_that_steps(optimizer, site.values), "block_ages", None)
    if ages_of is None:
        return {}
    ages, counts = torch.unique(ages_of(site.values).cpu(), return_counts=True)
    return dict(zip(ages.tolist(), counts.tolist(), strict=True))


def together(histories: Sequence[SiteHistory]) -> tuple[Cohort, ...]:
    """The cohorts of several weights, those of one birth as one."""
    total: dict[int, list[int]] = {}
    for cohort in (cohort for history in histories for cohort in history.cohorts):
        so_far = total.setdefault(cohort.born_step, [0, 0])
        so_far[0] += cohort.num_grown
        so_far[1] += cohort.num_active
    return tuple(Cohort(born, *counts) for born, counts in sorted(total.items()))
