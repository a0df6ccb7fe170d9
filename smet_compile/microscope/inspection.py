"""Inspection: what ``inspect`` found, as plain data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smet_compile.microscope.dead import DeadUnits
from smet_compile.microscope.history import Cohort, SiteHistory, together
from smet_compile.microscope.said import active_weights, ages, aligned, number, paths_alive, survival
from smet_compile.microscope.site_reach import Reach

if TYPE_CHECKING:
    import networkx

HEADINGS = ("site", "shape", "density", "dead in", "dead out", "starved in", "unread out", "effective")
HISTORY_HEADINGS = ("churn", "mean age", "explored")


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
            number(self.effective_density, ".4f"),
            number(churn, ".4f"),
            number(self.history.mean_age, ".1f"),
            number(self.history.explored_fraction, ".4f"),
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
        total, active = (
            sum(site.num_weights for site in self.sites),
            sum(site.num_active_weights for site in self.sites),
        )
        reached = [site.reach.num_live_weights for site in self.sites if site.reach is not None]
        lines = [
            f"{len(self.sites)} sites, {active_weights(total, active, sum(reached) if reached else None)}",
            paths_alive(self.path_log10_share),
            ages(self.age_counts),
            survival(self.cohorts),
        ]
        return [line for line in lines if line] + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join([*(aligned(self.rows) if self.sites else []), *self.summary])
