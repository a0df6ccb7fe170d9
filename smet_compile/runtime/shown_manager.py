"""Shows a topology manager: its numbers for whoever logs them, its settings and updates in notebooks."""

from __future__ import annotations

from typing import Any

from smet_compile.notebook import frame_of, html_lines, html_table, html_view
from smet_compile.ops import Site
from smet_compile.runtime.history import FRACTIONS, TopologyEvent
from smet_compile.runtime.metrics import flat_metrics

_HEADINGS = {
    "step": "step",
    "density": "density",
    "num_dropped": "dropped",
    "num_added": "grown",
    "churn_fraction": "churn",
    "newcomer_fraction": "newcomers among the dropped",
    "grown_survival_fraction": "survivors of the last grown",
    "explored_fraction": "explored",
    "moved_fraction": "moved",
    "mean_age": "mean age",
}


class ShownManager:
    """Knows how a ``TopologyManager``, which derives from it, is shown."""

    sites: dict[str, Site]
    history: list[TopologyEvent]
    num_steps: int

    @property
    def settings(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def next_update(self) -> int | None:
        raise NotImplementedError

    @property
    def optimizers(self) -> list[Any]:
        raise NotImplementedError

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Returns numbers to log: density, bytes of compact weights, steps, updates, and fractions of the last update.

        The fractions are those of ``SiteEvent``, for all weights together. Skipped blocks are those of this rank's
        optimizers; reading them waits for the device.

        Args:
            prefix: what each name begins with; integrations log with "smet/".
        """
        found = flat_metrics(self.sites, self.history, self.num_steps, self.optimizers)
        return {f"{prefix}{name}": value for name, value in found.items()}

    def to_pandas(self) -> Any:
        """Returns a ``DataFrame`` with a row for each update; a list of dicts where pandas is not installed.

        The numbers are those of all weights together, as in ``TopologyEvent.total``. ``density`` is that of a density
        stage, and None for an update; ``history`` has the numbers of each weight.
        """
        return frame_of([_record(event) for event in self.history])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.sites)} compact weights: {self._progress})"

    @property
    def _progress(self) -> str:
        upcoming = "none to come" if self.next_update is None else f"the next after step {self.next_update:,}"
        return f"{len(self.history):,} topology updates in {self.num_steps:,} steps, {upcoming}"

    def _repr_html_(self) -> str:
        title = self._progress
        settings = ", ".join(f"{name} = {value}" for name, value in self.settings.items() if value is not None)
        rows = [[_cell(record[name]) for name in _HEADINGS] for record in map(_record, self.history)]
        table = html_table(tuple(_HEADINGS.values()), rows, left=()) if rows else ""
        return html_view(title, html_lines([f"{len(self.sites)} compact weights", settings]), table)


def _record(event: TopologyEvent) -> dict[str, Any]:
    total = event.total
    found = {"step": event.step, "density": event.density, "drop_fraction": event.drop_fraction}
    names = "num_active", "num_dropped", "num_added", "num_newcomers_dropped", *FRACTIONS, "mean_age"
    return found | {name: getattr(total, name) for name in names}


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
