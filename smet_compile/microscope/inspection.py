"""Inspection: what ``inspect`` found, as plain data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smet_compile.microscope.dead import DeadUnits
from smet_compile.microscope.history import Cohort, SiteHistory, together

if TYPE_CHECKING:
    import networkx

HEADINGS = ("site", "shape", "density", "dead in", "dead out", "starved in", "unread out", "effective")
HISTORY_HEADINGS = ("churn", "mean age", "explored")


@dataclass(frozen=True)
class Reach:
    """How one weight lies in the whole model.

    Args:
        starved: (S C,) bool: inputs with active weights to which nothing comes that depends on the model's input.
        unread: (S R,) bool: outputs with active weights of which nothing arrives at the model's output.
        num_live_weights: active weights on a path from input to output all of which is active.
    """

    starved: Tensor
    unread: Tensor
    num_live_weights: int


@dataclass(frozen=True)
class SiteInspection:
    """One compact weight, a stack of S matrices (R, C).

    Args:
        num_blocks, num_active: blocks, and how many are active, read back from the topology.
        num_weights, num_active_weights: weights of the dense matrices, and those inside of active blocks.
        dead: inputs and outputs without active weight. history: ages, churn, cohorts.
        reach: None where the example does not use this weight, or the forward could not be captured.
    """

    name: str
    shape: tuple[int, ...]
    block_shape: tuple[int, int]
    num_blocks: int
    num_active: int
    num_weights: int
    num_active_weights: int
    dead: DeadUnits = field(repr=False, compare=False)
    history: SiteHistory = field(repr=False)
    reach: Reach | None = field(default=None, repr=False, compare=False)

    @property
    def density(self) -> float:
        return self.num_active / self.num_blocks

    @property
    def num_dead_inputs(self) -> int:
        return int(self.dead.inputs.sum())

    @property
    def num_dead_outputs(self) -> int:
        return int(self.dead.outputs.sum())

    @property
    def num_starved_inputs(self) -> int | None:
        return None if self.reach is None else int(self.reach.starved.sum())

    @property
    def num_unread_outputs(self) -> int | None:
        return None if self.reach is None else int(self.reach.unread.sum())

    @property
    def effective_density(self) -> float | None:
        """Weights on a path from input to output all of which is active, of all weights (Vysogorets and Kempe 2023)."""
        return None if self.reach is None else self.reach.num_live_weights / self.num_weights

    def cells(self) -> tuple[str, ...]:
        """A row of the table under ``HEADINGS`` and ``HISTORY_HEADINGS``; "-" for what is not known."""
        units = (self.num_dead_inputs, self.num_dead_outputs, self.num_starved_inputs, self.num_unread_outputs)
        sides = (self.dead.inputs.numel(), self.dead.outputs.numel()) * 2
        said = ("-" if n is None else f"{n}/{side}" if n else "0" for n, side in zip(units, sides, strict=True))
        churn = self.history.churn[-1][1] if self.history.churn else None
        return (
            self.name,
            "x".join(map(str, self.shape)),
            f"{self.density:.4f}",
            *said,
            _number(self.effective_density, ".4f"),
            _number(churn, ".4f"),
            _number(self.history.mean_age, ".1f"),
            _number(self.history.explored_fraction, ".4f"),
        )


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found. ``print`` it for a table.

    Args:
        sites: one for each compact weight.
        graph: which weight feeds which, through residuals, norms, attention: a ``networkx.DiGraph`` of their names
            with "input" and "output" and the dense matrices between; each node has a ``kind`` ("site", "dense",
            "input", "output"), sites a ``density`` too. Without edges where the forward could not be captured.
        path_log10_share: the logarithm to base 10 of the share of input-output paths that is alive: their number
            through active weights over that with every weight active; None where it is not known.
        notes: what could not be captured or is not known, in words.
    """

    sites: tuple[SiteInspection, ...]
    graph: networkx.DiGraph[str] = field(repr=False, compare=False)
    path_log10_share: float | None
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> SiteInspection:
        """The site called ``name``."""
        return next(site for site in self.sites if site.name == name)

    @property
    def cohorts(self) -> tuple[Cohort, ...]:
        """Survival of grown blocks by birth, of all weights together."""
        return together([site.history for site in self.sites])

    @property
    def age_counts(self) -> dict[int, int]:
        """Age in steps → number of active blocks, of all weights together."""
        total: dict[int, int] = {}
        for age, count in (item for site in self.sites for item in site.history.age_counts.items()):
            total[age] = total.get(age, 0) + count
        return dict(sorted(total.items()))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The table, its headings first; columns without any entry are left out."""
        table = [HEADINGS + HISTORY_HEADINGS, *(site.cells() for site in self.sites)]
        used = [i for i in range(len(table[0])) if any(row[i] != "-" for row in table[1:])]
        return [tuple(row[i] for i in used) for row in table]

    @property
    def summary(self) -> list[str]:
        """What holds of the model as a whole, a line each."""
        lines = [f"{len(self.sites)} sites, {_active(self.sites)}", *_paths(self.path_log10_share)]
        lines += [line for line in (_ages(self.age_counts), _survival(self.cohorts)) if line]
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in self.rows
        ]
        return "\n".join([*lines, *self.summary])


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _active(sites: tuple[SiteInspection, ...]) -> str:
    total, active = sum(site.num_weights for site in sites), sum(site.num_active_weights for site in sites)
    reached = [site.reach for site in sites if site.reach is not None]
    live = f", {sum(reach.num_live_weights for reach in reached):,} on a live path" if reached else ""
    return f"{active:,} of {total:,} weights active ({active / total:.4f}){live}"


def _paths(log10_share: float | None) -> list[str]:
    if log10_share is None:
        return []
    if log10_share == float("-inf"):
        return ["input-output paths alive: none"]
    return [f"input-output paths alive: a share of 10^{log10_share:.2f}"]


def _ages(counts: dict[int, int]) -> str:
    """Shares of the active blocks by age, in at most eight bins."""
    if not counts:
        return ""
    total, width = sum(counts.values()), max(1, -(-(max(counts) + 1) // 8))
    bins = {start: 0 for start in range(0, max(counts) + 1, width)}
    for age, count in counts.items():
        bins[age // width * width] += count
    said = "  ".join(f"{start}-{start + width - 1}: {count / total:.1%}" for start, count in bins.items())
    return f"active blocks by age in steps:  {said}"


def _survival(cohorts: tuple[Cohort, ...]) -> str:
    """The latest eight births."""
    known = [(c.born_step, c.survival_fraction) for c in cohorts if c.survival_fraction is not None]
    said = "  ".join(f"{born}: {fraction:.1%}" for born, fraction in known[-8:])
    return f"still active, by step of birth:  {said}" if len(known) > 1 else ""
