"""Says when a topology changes and by what fraction, and compares these settings when a run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from smet_compile.ops.loaded import kind_of, plain_number


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
        progress = min(1.0, step / self.stop_step)
        return self.last + (self.first - self.last) * self.decay(progress)

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


SCHEDULES: dict[str, type[Schedule]] = {
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "constant": ConstantSchedule,
    "none": NoSchedule,
}

SETTINGS = (
    "total_steps",
    "every",
    "drop_fraction",
    "final_drop_fraction",
    "stop_fraction",
    "grow",
    "schedule",
    "seed",
)
"""The settings of a manager that are saved with a run."""
_FORMER_SETTINGS = {"drop": "magnitude"}
"""Settings that only older versions saved, with the one value that they could have."""


def check_override(override: Iterable[str]) -> frozenset[str]:
    """Returns the names of the settings that may differ. Raises ValueError for one that is none."""
    names = [override] if isinstance(override, str) else list(override)
    for name in names:
        if name not in SETTINGS:
            raise ValueError(f"override: expected names of settings ({', '.join(SETTINGS)}), got {name!r}")
    return frozenset(names)


def check_settings(saved: Any, ours: dict[str, Any], override: Iterable[str]) -> None:
    """Raises ValueError where ``saved`` differs from ``ours`` in a setting that is not in ``override``.

    A setting that was not saved is not compared: an older version wrote the file.
    """
    may_differ = check_override(override)
    if not isinstance(saved, dict):
        raise ValueError(f"settings: expected a dict, got {kind_of(saved)}")
    for name, value in saved.items():
        if name in _FORMER_SETTINGS and _equal(plain_number(value), _FORMER_SETTINGS[name]):
            continue
        if name not in SETTINGS:
            got = f"{name!r} of {value!r:.80}" if name in _FORMER_SETTINGS else repr(name)
            raise ValueError(f"settings: got {got}, which this version does not know; upgrade smet_compile")
        if name not in may_differ and not _equal(plain_number(value), plain_number(ours[name])):
            raise ValueError(
                f"{name}: expected {ours[name]!r} as in this manager, got {value!r:.80} in the saved run; make the "
                f'manager with that, or pass override=("{name}",) to go on with {ours[name]!r}'
            )


def _equal(value: Any, other: Any) -> bool:
    return (type(value) is bool) == (type(other) is bool) and type(value) in (bool, int, float, str) and value == other
