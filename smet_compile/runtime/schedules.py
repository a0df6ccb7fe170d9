"""How often a topology changes, and by what fraction."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Updates after every ``every`` steps, none at or after ``stop_step``.

    ``drop_fraction`` goes from ``first`` at step 0 to ``last`` at ``stop_step``.
    """

    every: int
    stop_step: float
    first: float
    last: float

    def is_due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0 and step < self.stop_step

    def next_after(self, step: int) -> int | None:
        """The first update after ``step``; None where there is none."""
        upcoming = (step // self.every + 1) * self.every
        return upcoming if upcoming < self.stop_step else None

    def drop_fraction(self, step: int) -> float:
        progress = min(1.0, step / self.stop_step)
        return self.last + (self.first - self.last) * self.decay(progress)

    def decay(self, progress: float) -> float:
        """What is left at ``progress``, from 1 at 0 to 0 at 1."""
        raise NotImplementedError


class CosineSchedule(Schedule):
    """Half a cosine, as in RigL (Evci et al. 2020)."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class LinearSchedule(Schedule):
    def decay(self, progress: float) -> float:
        return 1 - progress


class ConstantSchedule(Schedule):
    """``first`` throughout."""

    def decay(self, progress: float) -> float:
        return 1.0


class NoSchedule(ConstantSchedule):
    """Static sparsity: no update is ever due."""

    def is_due(self, step: int) -> bool:
        return False

    def next_after(self, step: int) -> int | None:
        return None


SCHEDULES: dict[str, type[Schedule]] = {
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "constant": ConstantSchedule,
    "none": NoSchedule,
}
