"""What fits into so many bytes: the largest batch, or the largest density."""

from __future__ import annotations

from collections.abc import Callable

from smet_compile.plan import Plan, bytes_text
from smet_compile.planner.report import plan_of
from smet_compile.planner.run import PlannedRun
from smet_compile.planner.wish import Wish

_PARTS = 10_000
"""Densities that are solved for are multiples of 1 / this."""


def largest_batch(run: PlannedRun, limit: int) -> Plan:
    """The plan at the largest batch whose peak is at most ``limit`` bytes."""
    least = run.peak(1)
    if least > limit:
        raise _nothing_fits(limit, least, "at batch 1", "lower the density, or allow more")
    return plan_of(run, _largest(lambda batch: run.peak(batch) <= limit))


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number for which it ``holds``, as it does for 1, and for all below."""
    high = 2
    while holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def largest_density(wish: Wish, first: float, batch: int, limit: int) -> Plan:
    """The plan at the largest density whose peak is at most ``limit`` bytes.

    Searches by the bytes stored at each density and the timeline of a run at ``first``, then makes sure by a plan.
    """
    run = PlannedRun(wish, first)
    least = run.peak(batch, 1 / _PARTS)
    if least > limit:
        raise _nothing_fits(limit, least, f"at density {1 / _PARTS:g} and batch {batch}", "lower batch or sequence")
    parts = _largest(lambda parts: parts <= _PARTS and run.peak(batch, parts / _PARTS) <= limit)
    for fewer in range(parts, 0, -max(1, parts // 100)):
        found = plan_of(PlannedRun(wish, fewer / _PARTS), batch)
        if found.sparse.peak <= limit:
            return found
    raise _nothing_fits(limit, least, f"at density {1 / _PARTS:g} and batch {batch}", "lower batch or sequence")


def _nothing_fits(limit: int, least: float, where: str, advice: str) -> ValueError:
    return ValueError(
        f"fits: expected at least {least:,.0f} bytes ({bytes_text(least)}), the least there is {where}, got "
        f"{limit:,}; {advice}"
    )
