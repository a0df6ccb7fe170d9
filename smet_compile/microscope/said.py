"""Figures of an inspection in words; "" for what is not known."""

from __future__ import annotations

from collections.abc import Sequence

from smet_compile.microscope.history import Cohort


def number(value: float | None, form: str) -> str:
    """A cell of the table."""
    return "-" if value is None else format(value, form)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def active_weights(total: int, active: int, live: int | None) -> str:
    on_path = "" if live is None else f", {live:,} on a live path"
    return f"{active:,} of {total:,} weights active ({active / max(1, total):.4f}){on_path}"


def paths_alive(log10_share: float | None) -> str:
    if log10_share is None:
        return ""
    share = "none" if log10_share == float("-inf") else f"a share of 10^{log10_share:.2f}"
    return f"input-output paths alive: {share}"


def ages(counts: dict[int, int]) -> str:
    """Shares of the active blocks by age, in at most eight bins."""
    if not counts:
        return ""
    total, width = sum(counts.values()), max(1, -(-(max(counts) + 1) // 8))
    bins = {start: 0 for start in range(0, max(counts) + 1, width)}
    for age, count in counts.items():
        bins[age // width * width] += count
    said = "  ".join(f"{start}-{start + width - 1}: {count / total:.1%}" for start, count in bins.items())
    return f"active blocks by age in steps:  {said}"


def survival(cohorts: Sequence[Cohort]) -> str:
    """The latest eight births."""
    known = [(c.born_step, c.survival_fraction) for c in cohorts if c.survival_fraction is not None]
    said = "  ".join(f"{born}: {fraction:.1%}" for born, fraction in known[-8:])
    return f"still active, by step of birth:  {said}" if len(known) > 1 else ""
