"""Writes rows of ratios beside their targets, as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.measuring import spread

AWAITS_GPU = "awaits a GPU"
FOR_INFORMATION = "for information"
_NONE = "—"


class Target(NamedTuple):
    limit: float
    at_least: bool

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:.3g}"

    def verdict(self, ratio: float) -> str:
        """Returns "yes" where ``ratio`` meets the target, or by how much it misses."""
        missing = self.limit - ratio if self.at_least else ratio - self.limit
        return "yes" if missing <= 0 else f"no, by {missing / self.limit:.0%}"


def at_least(limit: float) -> Target:
    return Target(limit, True)


def at_most(limit: float) -> Target:
    return Target(limit, False)


@dataclass(frozen=True)
class Row:
    """Holds one measurement.

    Args:
        what: was measured. kernel: that was chosen for it.
        ratios: one of each pair; none where nothing was measured, and ``unmeasured`` says why.
        target: of their median; None for a number that is for information. more: further columns, by heading.
    """

    what: str
    kernel: str = _NONE
    ratios: Sequence[float] = ()
    target: Target | None = None
    more: Mapping[str, str] = field(default_factory=dict)
    unmeasured: str = ""

    @property
    def verdict(self) -> str:
        if self.unmeasured:
            return self.unmeasured
        return FOR_INFORMATION if self.target is None else self.target.verdict(statistics.median(self.ratios))


@dataclass(frozen=True)
class Table:
    """Holds rows that belong together.

    Args:
        ratio: heading of the ratios: what over what. note: what a reader has to know.
    """

    title: str
    ratio: str
    note: str
    rows: Sequence[Row]

    def markdown(self) -> str:
        more = list(dict.fromkeys(key for row in self.rows for key in row.more))
        headings = ["", "kernel", f"{self.ratio}: median (least-largest)", "target", "met", *more]
        lines = [f"### {self.title}", "", self.note, "", _line(headings), "|" + "---|" * len(headings)]
        return "\n".join(lines + [_line(self._cells(row, more)) for row in self.rows]) + "\n"

    def _cells(self, row: Row, more: list[str]) -> list[str]:
        ratios = spread(row.ratios, ".3g") if row.ratios else _NONE
        target = _NONE if row.target is None else str(row.target)
        return [row.what, row.kernel, ratios, target, row.verdict, *(row.more.get(key, _NONE) for key in more)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
