"""Says when a topology changes and by what fraction, and for how long newcomers are protected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from smet_compile.format.arguments import described, number, qualified_name
from smet_compile.ops import Site

ScheduleName = Literal["cosine", "linear", "constant", "none"]
DEFAULT_SCHEDULE: ScheduleName = "cosine"
"""The schedule of weights that move where none is asked for."""
_MOST_LOOKED_AT = 10_000
"""Number of updates for which a schedule given as a function is asked in advance."""


@dataclass(frozen=True)
class Schedule:
    """Has an update after every ``every`` steps, and none at or after ``stop_step``.

    ``drop_fraction`` goes from ``first`` at step 0 to ``last`` at ``stop_step``.
    """

    every: int
    stop_step: float
    first: float
    last: float

    def next_after(self, step: int) -> int | None:
        """Returns the first update after ``step``; None where there is none."""
        upcoming = (step // self.every + 1) * self.every
        return upcoming if upcoming < self.stop_step else None

    def drop_fraction(self, step: int) -> float:
        """Returns ζ of the update after ``step``."""
        progress = min(1.0, step / self.stop_step)
        return self.last + (self.first - self.last) * self.decay(progress)

    @property
    def largest_fraction(self) -> float:
        """Returns the most that an update ever drops."""
        return max(self.first, self.last)

    @property
    def num_updates(self) -> int:
        """Counts the updates of the whole run."""
        return max(0, math.ceil(self.stop_step / self.every) - 1)

    def decay(self, progress: float) -> float:
        """Returns 1 at a progress of 0, 0 at a progress of 1, and something between in between."""
        raise NotImplementedError


class CosineSchedule(Schedule):
    """Follows half a cosine, as RigL does (Evci et al. 2020)."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class LinearSchedule(Schedule):
    """Follows a straight line."""

    def decay(self, progress: float) -> float:
        return 1 - progress


class ConstantSchedule(Schedule):
    """Stays at ``first`` throughout."""

    def decay(self, progress: float) -> float:
        return 1.0


class NoSchedule(ConstantSchedule):
    """Keeps the topology static: there is never an update."""

    def next_after(self, step: int) -> int | None:
        return None

    @property
    def num_updates(self) -> int:
        return 0


@dataclass(frozen=True)
class FunctionSchedule(Schedule):
    """Asks a function of the user, step → ζ."""

    function: Callable[[int], float]

    def drop_fraction(self, step: int) -> float:
        return number(f"schedule({step})", self.function(step), at_least=0, below=1, advice="return a drop fraction")

    @property
    def largest_fraction(self) -> float:
        upcoming = range(self.every, math.ceil(self.stop_step), self.every)[:_MOST_LOOKED_AT]
        return max((self.drop_fraction(step) for step in upcoming), default=0.0)


SCHEDULES: dict[str, type[Schedule]] = {
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "constant": ConstantSchedule,
    "none": NoSchedule,
}
assert set(SCHEDULES) == set(get_args(ScheduleName))


def make_schedule(schedule: str | Callable[[int], float], plain: Schedule) -> Schedule:
    """Returns the schedule of a name, or of a function step → ζ; ``plain`` holds when updates come and how large.

    Raises ValueError for an unknown name, and for a function that returns no fraction.
    """
    times = plain.every, plain.stop_step, plain.first, plain.last
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return SCHEDULES[schedule](*times)
    if not callable(schedule):
        raise ValueError(
            f"schedule: expected one of {', '.join(SCHEDULES)} or a function of the step, got {described(schedule)}; "
            "pass one of these, or leave it out: tiles then stay where they are"
        )
    return FunctionSchedule(*times, schedule)


def find_moving(sites: dict[str, Site], schedule: str | Callable[[int], float] | None) -> dict[str, Site]:
    """Returns the weights whose topology changes: all or none, as the schedule says; by default all but tiles."""
    if schedule is None:
        return {name: site for name, site in sites.items() if not site.layout.tiles}
    return {} if schedule == "none" else dict(sites)


def name_of_schedule(schedule: str | Callable[[int], float] | None, num_moving: int, num_weights: int) -> str:
    """Returns the name of a schedule as checkpoints keep it: that of a function is its qualified name."""
    if schedule is not None:
        return schedule if isinstance(schedule, str) else qualified_name(schedule)
    if num_moving == num_weights:
        return DEFAULT_SCHEDULE
    return f"{DEFAULT_SCHEDULE}, tiles stay" if num_moving else "none"


def find_min_age(min_age: int | None, schedule: Schedule) -> int:
    """Returns how many optimizer steps newly grown blocks are protected; by default 2 ΔT.

    Each update that may not drop the newcomers of m updates before it needs (m + 1) ζ ≤ 1. The default leaves at least
    twice as many as it drops, (m + 2) ζ ≤ 1, else it protects nobody: where every block that is not new has to go,
    models trained worse (docs/choosing.md).

    Raises:
        ValueError: a given age that leaves fewer unprotected blocks than an update drops.
    """
    fraction, every = schedule.largest_fraction, schedule.every
    longest = every * math.floor(1 / fraction + 1e-9) if fraction else None
    if min_age is None:
        return 2 * every if longest is None else min(2 * every, max(every, longest - every))
    if longest is not None and min_age > longest:
        raise ValueError(
            f"min_age: expected at most {longest} steps, got {min_age}: an update every {every} steps drops "
            f"{fraction:g} of the blocks, so with the newcomers of {-(-min_age // every) - 1} updates protected too "
            "few would be left to drop; lower min_age or drop_fraction"
        )
    return min_age
