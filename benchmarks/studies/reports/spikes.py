"""Writes the page of the study of loss spikes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.studies import probe as metric
from benchmarks.studies import spikes as study
from benchmarks.studies.probe import LENGTH, Window, rise
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import Interval, interval
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale

_SHOWN = ("naive SET", "naive RigL", "rate scaling only", "age only", "SMET")


@dataclass(frozen=True)
class Seen:
    """Holds one method's windows at updates and without one, for all seeds, and its final losses."""

    updates: list[Window]
    nulls: list[Window]
    losses: list[float]

    @property
    def rise(self) -> Interval:
        return interval([window.rise for window in self.updates])

    @property
    def bump(self) -> Interval:
        return interval([window.bump for window in self.updates])

    @property
    def jump(self) -> Interval:
        return interval([window.jump for window in self.updates if window.jump is not None])


def seen(records: Records, scale: Scale, method: str, every: int, density: float) -> Seen | None:
    keys = [study.case(scale, method, every, density, seed).key for seed in scale.seeds]
    runs = [records[key] for key in keys if key in records]
    windows = [window for run in runs for window in (Window(**saved) for saved in run["windows"]) if not window.is_open]
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    updates, nulls = ([w for w in windows if w.is_null == null] for null in (False, True))
    return Seen(updates, nulls, losses) if runs else None


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Loss spikes at topology updates", folder)
    page.text(study.__doc__ or "", "## The metric", metric.__doc__ or "", f"{_READ} {_nulls(records, scale)}")
    page.text(how_made(study.NAME, study.cases(scale), records))
    figure = _figure(records, scale)
    page.figure(
        figure, "Loss of the probe batch after an update less what it would have been without, mean and 95% interval"
    )
    for every, density in study.SETTINGS:
        page.text(f"## An update every {every} steps, density {density:g}")
        found = {method: seen(records, scale, method, every, density) for method in study.METHODS}
        page.table(_HEADINGS, [_row(method, each) for method, each in found.items() if each])
    page.write()


_READ = (
    "Means over the windows of all seeds with 95% confidence intervals (Student's t); those that exclude zero are in "
    "bold. *without*: the rise of the copy that was not updated, the noise in which a spike would have to be seen."
)
_HEADINGS = ["method", "windows", "rise", "bump", "jump", "without", "held-out loss at the end"]


def _row(method: str, found: Seen) -> list[str]:
    loss = interval(found.losses).format(sign=False) if found.losses else "diverged"
    if not found.updates:
        return [method, "0", "—", "—", "—", "—", loss]
    without = interval([rise(window.without) for window in found.updates]).format()
    cells = [_bold(found.rise), _bold(found.bump, 3), _bold(found.jump), without]
    return [method, str(len(found.updates)), *cells, loss]


def _nulls(records: Records, scale: Scale) -> str:
    found = [seen(records, scale, method, *study.DEFAULT) for method in study.METHODS]
    rises = [window.rise for each in found if each for window in each.nulls]
    return f"In {len(rises)} windows without an update the rise is {interval(rises).format(6)}." if rises else ""


def _bold(value: Interval, digits: int = 4) -> str:
    return f"**{value.format(digits)}**" if value.excludes_zero else value.format(digits)


def _figure(records: Records, scale: Scale):
    figure = new_figure(height=3.6)
    row = figure.subplots(1, len(study.SETTINGS), sharey=True)
    for axes, (every, density) in zip(row, study.SETTINGS, strict=True):
        for number, method in enumerate(_SHOWN):
            found = seen(records, scale, method, every, density)
            if found and found.updates:
                _curve(axes, found.updates, f"C{number}", method)
        axes.axhline(0, color="k", linewidth=0.8, linestyle="--")
        tidy(axes, title=f"ΔT = {every}, d = {density:g}", xlabel="steps after the update")
    row[0].set_ylabel("loss with the update − without")
    legend_above(figure, row[0])
    return figure


def _curve(axes, windows: list[Window], color: str, label: str) -> None:
    found = [interval([w.losses[k] - w.without[k] for w in windows]) for k in range(LENGTH + 1)]
    means = [each.mean for each in found]
    axes.plot(range(LENGTH + 1), means, color=color, linewidth=1.4, label=label)
    if found[1].num > 1:
        low, high = ([each.mean + sign * each.half for each in found] for sign in (-1, 1))
        axes.fill_between(range(LENGTH + 1), low, high, color=color, alpha=0.15, linewidth=0)
