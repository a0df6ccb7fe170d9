"""The page of the study of loss spikes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.studies import probe as metric
from benchmarks.studies import spikes as study
from benchmarks.studies.probe import LENGTH, Window
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import Interval, interval
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, new_figure, tidy
from benchmarks.studies.scale import Scale

_SHOWN = ("naive SET", "naive RigL", "rate scaling only", "SMET", "static")


@dataclass(frozen=True)
class Seen:
    """The windows of one method, of all its seeds: each update's, paired with the control that follows it."""

    pairs: list[tuple[Window, Window]]
    losses: list[float]

    @property
    def rise(self) -> Interval:
        return interval([update.rise - control.rise for update, control in self.pairs])

    @property
    def bump(self) -> Interval:
        return interval([update.bump - control.bump for update, control in self.pairs])

    @property
    def jump(self) -> Interval | None:
        jumps = [update.jump for update, _ in self.pairs if update.jump is not None]
        return interval(jumps) if jumps else None


def seen(records: Records, scale: Scale, method: str, every: int, density: float) -> Seen | None:
    keys = [study.case(scale, method, every, density, seed).key for seed in scale.seeds]
    runs = [records[key] for key in keys if key in records]
    pairs = []
    for run in runs:
        windows = [window for window in (Window(**saved) for saved in run["windows"]) if not window.is_open]
        # two a period, an update's (or what stands in its place) first
        pairs += list(zip(windows[::2], windows[1::2], strict=False))
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    return Seen(pairs, losses) if pairs else None


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Loss spikes at topology updates", folder)
    page.text(study.__doc__ or "", "## The metric", metric.__doc__ or "", _PAIRS)
    page.text(how_made(study.NAME, study.cases(scale), records))
    figure = _figure(records, scale)
    page.figure(figure, "Mean loss of the probe batch around an update, less its value before")
    for every, density in study.SETTINGS:
        page.text(f"## An update every {every} steps, density {density:g}")
        found = {method: seen(records, scale, method, every, density) for method in study.METHODS}
        page.table(_HEADINGS, [_row(method, each) for method, each in found.items() if each])
    page.write()


_PAIRS = (
    "Every update's window is paired with the control that follows it in the same run; the tables give the mean "
    "difference within pairs with its 95% confidence interval (Student's t over all pairs of all seeds). A difference "
    "whose interval excludes zero is in bold. For static and dense training both windows of a pair are without an "
    "update: what the metric says where there is nothing to see."
)
_HEADINGS = ["method", "pairs", "rise − control", "bump − control", "jump", "rise, control", "held-out loss at the end"]


def _row(method: str, found: Seen) -> list[str]:
    control = statistics.fmean(c.rise for _, c in found.pairs)
    loss = interval(found.losses).format(sign=False) if found.losses else "diverged"
    jump = found.jump.format() if found.jump else "—"
    return [method, str(len(found.pairs)), _bold(found.rise), _bold(found.bump, 3), jump, f"{control:+.4f}", loss]


def _bold(value: Interval, digits: int = 4) -> str:
    return f"**{value.format(digits)}**" if value.excludes_zero else value.format(digits)


def _figure(records: Records, scale: Scale):
    figure = new_figure(height=3.6)
    row = figure.subplots(1, len(study.SETTINGS), sharey=True)
    for axes, (every, density) in zip(row, study.SETTINGS, strict=True):
        for number, method in enumerate(_SHOWN):
            found = seen(records, scale, method, every, density)
            if found:
                _curve(axes, [update for update, _ in found.pairs], f"C{number}", "-", method)
                _curve(axes, [control for _, control in found.pairs], f"C{number}", ":", None)
        tidy(axes, title=f"ΔT = {every}, d = {density:g}", xlabel="steps after the update")
    row[0].set_ylabel("loss − loss before (nats per byte)")
    row[0].legend(fontsize=8, title="dotted: no update", title_fontsize=8)
    return figure


def _curve(axes, windows: list[Window], color: str, style: str, label: str | None) -> None:
    means = [statistics.fmean(w.losses[k] - w.losses[0] for w in windows) for k in range(LENGTH + 1)]
    axes.plot(range(LENGTH + 1), means, style, color=color, linewidth=1.4 if style == "-" else 0.9, label=label)
