"""Compares the settings of a manager with those of a saved run that it is to continue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from smet_compile.ops.loaded import kind_of, plain_number

SETTINGS = (
    "total_steps",
    "every",
    "drop_fraction",
    "final_drop_fraction",
    "stop_fraction",
    "drop",
    "grow",
    "schedule",
    "min_age",
    "window",
    "ablation_threshold",
    "seed",
    "density_schedule",
)
"""The settings of a manager that are saved with a run."""


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
        if name not in SETTINGS:
            raise ValueError(f"settings: got {name!r}, which this version does not know; upgrade smet_compile")
        if name not in may_differ and not _equal(plain_number(value), plain_number(ours[name])):
            raise ValueError(
                f"{name}: expected {ours[name]!r} as in this manager, got {value!r:.80} in the saved run; make the "
                f'manager with that, or pass override=("{name}",) to go on with {ours[name]!r}'
            )


def _equal(value: Any, other: Any) -> bool:
    if value is None or other is None:
        return value is other
    if isinstance(value, list):
        return isinstance(other, list) and len(value) == len(other) and all(map(_equal, value, other))
    return (type(value) is bool) == (type(other) is bool) and type(value) in (bool, int, float, str) and value == other
