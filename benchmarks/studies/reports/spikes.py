"""Writes the page of the study of loss spikes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.studies import probe as metric
from benchmarks.studies import spikes as study
from benchmarks.studies.probe import LENGTH, Window, rise
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import Interval, bold, interval, paired
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale

_SHOWN = ("naive SET", "naive RigL", "rate scaling only", "SMET", "SMET, protected")
_OTHERS = ("SMET", "SMET, protected")  # what every method is compared with


@dataclass(frozen=True)
class Run:
    """Holds the closed windows of one run, at updates and without one, and its final loss, None if it diverged."""

    updates: list[Window]
    nulls: list[Window]
    loss: float | None

    @property
    def rise(self) -> float:
        return fmean(window.rise for window in self.updates)

    @property
    def bump(self) -> float:
        return fmean(window.bump for window in self.updates)

    @property
    def jump(self) -> float:
        return fmean(window.jump for window in self.updates if window.jump is not None)

    @property
    def without(self) -> float:
        return fmean(rise(window.without) for window in self.updates)


def runs(records: Records, scale: Scale, method: str, every: int, density: float) -> dict[int, Run]:
    """Returns the runs of one method by seed."""
    found = {}
    for seed in scale.many_seeds:
        key = study.case(scale, method, every, density, seed).key
        if key in records:
            windows = [Window(**saved) for saved in records[key]["windows"]]
            updates, nulls = ([w for w in windows if not w.is_open and w.is_null == null] for null in (False, True))
            found[seed] = Run(updates, nulls, records[key]["loss"])
    return found


def by_seed(found: dict[int, Run], name: str) -> dict[int, float]:
    """Returns a number of every run that has it: a run that diverged has no loss, a static one no windows."""
    having = {seed: run for seed, run in found.items() if (run.loss is not None if name == "loss" else run.updates)}
    return {seed: getattr(run, name) for seed, run in having.items()}


def over_seeds(found: dict[int, Run], name: str) -> Interval | None:
    """Returns the interval over runs, each of which counts once: windows of one run are not independent."""
    numbers = list(by_seed(found, name).values())
    return interval(numbers) if numbers else None


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
        found = {method: runs(records, scale, method, every, density) for method in study.METHODS}
        found = {method: each for method, each in found.items() if each}
        page.table(_HEADINGS, [_row(method, each) for method, each in found.items()])
        page.text("Pairs of runs of one seed: the row less the column.")
        page.table(_PAIR_HEADINGS, [_pair_row(method, found) for method in found])
    page.write()


_READ = (
    "Every run counts once, with the mean of its windows, since windows of one run are not independent. Means over "
    "seeds with 95% confidence intervals (Student's t); those that exclude zero are in bold, a single seed has none. "
    "*without*: the rise of the copy that was not updated, the noise in which a spike would have to be seen. Naive "
    "methods and those without rate scaling train at the dense rate, the others at 1/d times that; no method's rate "
    "was tuned for this page, so the losses at the end compare rates as well. *Rate scaling only* is naive SET at the "
    f"rate of SMET. *Protected*: newcomers are not dropped for {study.PROTECTED_UPDATES} updates; elsewhere the first "
    "update after their growth may drop them."
)
_HEADINGS = ["method", "seeds", "windows", "rise", "bump", "jump", "without", "held-out loss at the end"]
_PAIR_HEADINGS = ["method", *(f"{name} less {other}" for other in _OTHERS for name in ("rise", "loss"))]
_MISSING = "—"


def _row(method: str, found: dict[int, Run]) -> list[str]:
    loss = over_seeds(found, "loss")
    cells = [bold(over_seeds(found, name), digits) for name, digits in (("rise", 4), ("bump", 3), ("jump", 4))]
    without, windows = over_seeds(found, "without"), sum(len(run.updates) for run in found.values())
    cells.append(without.format() if without else _MISSING)
    end = loss.format(sign=False) if loss else "diverged"
    diverged = sum(run.loss is None for run in found.values())
    remark = f" ({diverged} diverged)" if loss and diverged else ""
    return [method, str(len(found)), str(windows), *cells, end + remark]


def _pair_row(method: str, found: dict[str, dict[int, Run]]) -> list[str]:
    cells = []
    for other in _OTHERS:
        for name in ("rise", "loss"):
            value = paired(by_seed(found[method], name), by_seed(found.get(other, {}), name))
            cells.append("" if other == method else bold(value))
    return [method, *cells]


def _nulls(records: Records, scale: Scale) -> str:
    found = [runs(records, scale, method, *study.DEFAULT) for method in study.METHODS]
    rises = [window.rise for each in found for run in each.values() for window in run.nulls]
    largest = max(map(abs, rises), default=0.0)
    return f"In {len(rises)} windows without an update the rise is {largest:.6f} at most." if rises else ""


def _figure(records: Records, scale: Scale):
    figure = new_figure(height=3.6)
    row = figure.subplots(1, len(study.SETTINGS), sharey=True)
    for axes, (every, density) in zip(row, study.SETTINGS, strict=True):
        for number, method in enumerate(_SHOWN):
            found = [run.updates for run in runs(records, scale, method, every, density).values() if run.updates]
            if found:
                _curve(axes, found, f"C{number}", method)
        axes.axhline(0, color="k", linewidth=0.8, linestyle="--")
        tidy(axes, title=f"ΔT = {every}, d = {density:g}", xlabel="steps after the update")
    row[0].set_ylabel("loss with the update − without")
    legend_above(figure, row[0])
    return figure


def _curve(axes, windows_of_runs: list[list[Window]], color: str, label: str) -> None:
    found = [
        interval([fmean(w.losses[k] - w.without[k] for w in windows) for windows in windows_of_runs])
        for k in range(LENGTH + 1)
    ]
    means = [each.mean for each in found]
    axes.plot(range(LENGTH + 1), means, color=color, linewidth=1.4, label=label)
    if found[1].num > 1:
        low, high = ([each.mean + sign * each.half for each in found] for sign in (-1, 1))
        axes.fill_between(range(LENGTH + 1), low, high, color=color, alpha=0.15, linewidth=0)
