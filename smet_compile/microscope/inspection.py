"""Holds what ``inspect`` found as plain data, and prints it as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smet_compile.microscope.live_paths import Reach
from smet_compile.microscope.per_site import Cohort, DeadUnits, SiteHistory, join_cohorts
from smet_compile.notebook import frame_of, html_lines, html_table, html_view
from smet_compile.tables import table_lines

if TYPE_CHECKING:
    import networkx

HEADINGS = ("site", "shape", "density", "dead in", "dead out", "starved in", "unread out", "effective")
HISTORY_HEADINGS = ("churn", "mean age", "explored")


@dataclass(frozen=True)
class SiteInspection:
    """Describes one compact weight, a stack of S matrices (R, C).

    Args:
        name: the name of the weight.
        shape: the shape of the dense weight.
        block_shape: the unit of sparsity, (bm, bn).
        num_blocks: the number of blocks.
        num_active: the number of active blocks, read back from the topology.
        num_weights: the number of weights of the dense matrices.
        num_active_weights: the number of those inside of active blocks.
        dead: inputs and outputs without active weight.
        history: ages, churn and cohorts.
        reach: None where the example does not use this weight, or the forward could not be recorded.
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
        """Returns the share of weights on a path of active weights from input to output (Vysogorets and Kempe 2023)."""
        return None if self.reach is None else self.reach.num_live_weights / self.num_weights

    def cells(self) -> tuple[str, ...]:
        """Returns a row of the table under ``HEADINGS`` and ``HISTORY_HEADINGS``; "-" for what is not known."""
        counts = (self.num_dead_inputs, self.num_dead_outputs, self.num_starved_inputs, self.num_unread_outputs)
        totals = (self.dead.inputs.numel(), self.dead.outputs.numel()) * 2
        units = ("-" if n is None else f"{n}/{total}" if n else "0" for n, total in zip(counts, totals, strict=True))
        churn = self.history.churn[-1][1] if self.history.churn else None
        return (
            self.name,
            "x".join(map(str, self.shape)),
            f"{self.density:.4f}",
            *units,
            _number(self.effective_density, ".4f"),
            _number(churn, ".4f"),
            _number(self.history.mean_age, ".1f"),
            _number(self.history.explored_fraction, ".4f"),
        )

    def record(self) -> dict[str, Any]:
        """Returns the numbers of the row under the names of attributes; None for what is not known."""
        plain = "name", "shape", "block_shape", "density", "num_blocks", "num_active"
        counts = "num_dead_inputs", "num_dead_outputs", "num_starved_inputs", "num_unread_outputs"
        found = {name: getattr(self, name) for name in (*plain, *counts, "effective_density")}
        churn = self.history.churn[-1][1] if self.history.churn else None
        explored, mean_age = self.history.explored_fraction, self.history.mean_age
        return found | {"churn_fraction": churn, "mean_age": mean_age, "explored_fraction": explored}


@dataclass(frozen=True)
class Inspection:
    """Holds what ``inspect`` found. ``print`` it for a table.

    Args:
        sites: one for each compact weight.
        graph: which weight feeds which, through residuals, norms, attention: a ``networkx.DiGraph`` of their names
            with "input" and "output" and the dense matrices between; each node has a ``kind`` ("site", "dense",
            "input", "output"), sites a ``density`` too. Without edges where the forward could not be recorded.
        path_log10_share: the logarithm to base 10 of the share of input-output paths that is alive: their number
            through active weights over that with every weight active; None where it is not known.
        notes: what could not be recorded or is not known, in words.
    """

    sites: tuple[SiteInspection, ...]
    graph: networkx.DiGraph[str] = field(repr=False, compare=False)
    path_log10_share: float | None
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> SiteInspection:
        """Returns the site called ``name``."""
        return next(site for site in self.sites if site.name == name)

    @property
    def cohorts(self) -> tuple[Cohort, ...]:
        """Returns the cohorts of all weights together: how many grown blocks survived, by birth."""
        return join_cohorts([site.history for site in self.sites])

    @property
    def age_counts(self) -> dict[int, int]:
        """Returns the ages of all weights together: age in steps → number of active blocks."""
        total: dict[int, int] = {}
        for age, count in (item for site in self.sites for item in site.history.age_counts.items()):
            total[age] = total.get(age, 0) + count
        return dict(sorted(total.items()))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table, its headings first; columns without any entry are left out."""
        table = [HEADINGS + HISTORY_HEADINGS, *(site.cells() for site in self.sites)]
        used = [i for i in range(len(table[0])) if any(row[i] != "-" for row in table[1:])]
        return [tuple(row[i] for i in used) for row in table]

    @property
    def summary(self) -> list[str]:
        """Returns the lines on the model as a whole."""
        total = sum(site.num_weights for site in self.sites)
        active = sum(site.num_active_weights for site in self.sites)
        live = [site.reach.num_live_weights for site in self.sites if site.reach is not None]
        on_path = f", {sum(live):,} on a live path" if live else ""
        share = f"({active / max(1, total):.4f})"
        lines = [f"{len(self.sites)} sites, {active:,} of {total:,} weights active {share}{on_path}"]
        lines += [_path_line(self.path_log10_share), _age_line(self.age_counts), _survival_line(self.cohorts)]
        return [line for line in lines if line] + [f"note: {note}" for note in self.notes]

    def to_pandas(self) -> Any:
        """Returns a ``DataFrame`` with a row for each site; a list of dicts where pandas is not installed."""
        return frame_of([site.record() for site in self.sites])

    def __str__(self) -> str:
        return "\n".join([*(table_lines(self.rows) if self.sites else []), *self.summary])

    def _repr_html_(self) -> str:
        title, *others = self.summary
        headings, *rows = self.rows
        return html_view(title, html_table(headings, rows) if rows else "", html_lines(others))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _path_line(log10_share: float | None) -> str:
    if log10_share is None:
        return ""
    share = "none" if log10_share == float("-inf") else f"a share of 10^{log10_share:.2f}"
    return f"input-output paths alive: {share}"


def _age_line(counts: dict[int, int]) -> str:
    """Returns a line on the shares of the active blocks by age, in at most eight bins."""
    if not counts:
        return ""
    total, width = sum(counts.values()), max(1, -(-(max(counts) + 1) // 8))
    bins = {start: 0 for start in range(0, max(counts) + 1, width)}
    for age, count in counts.items():
        bins[age // width * width] += count
    shares = "  ".join(f"{start}-{start + width - 1}: {count / total:.1%}" for start, count in bins.items())
    return f"active blocks by age in steps:  {shares}"


def _survival_line(cohorts: Sequence[Cohort]) -> str:
    """Returns a line on the survival of the latest eight births."""
    known = [(c.born_step, c.survival_fraction) for c in cohorts if c.survival_fraction is not None]
    shares = "  ".join(f"{born}: {fraction:.1%}" for born, fraction in known[-8:])
    return f"still active, by step of birth:  {shares}" if len(known) > 1 else ""
