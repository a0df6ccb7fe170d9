"""Writes the pages of studies that change one setting at a time, as differences from the default by seed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies import moments, sensitivity
from benchmarks.studies.case import Case
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import Interval, interval
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, new_figure, tidy
from benchmarks.studies.scale import Scale

_READ = (
    "Each row: the loss less that of the default at the same seed, mean and 95% interval over the seeds (Student's t). "
    "In bold where the interval excludes zero."
)


def difference(records: Records, pairs: list[tuple[Case, Case]]) -> Interval | None:
    """Returns the mean difference of losses over (changed, compared) runs; None where there is none yet."""
    keys = [(changed.key, default.key) for changed, default in pairs]
    found = [records[a]["loss"] - records[b]["loss"] for a, b in keys if a in records and b in records]
    return interval(found) if found else None


def _cell(value: Interval | None) -> str:
    if value is None:
        return "—"
    return f"**{value.format()}**" if value.excludes_zero else value.format()


def _mean(records: Records, cases: list[Case]) -> str:
    losses = [records[case.key]["loss"] for case in cases if case.key in records]
    return interval(losses).format(sign=False) if losses else "—"


def write_sensitivity(records: Records, scale: Scale, folder: Path) -> None:
    study = sensitivity
    page = Page(study.NAME, "Settings of the rule, one at a time", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records))
    page.text(f"Density {study.DENSITY:g}, single weights. The default's loss: "
              f"{_mean(records, [study.case(scale, seed) for seed in scale.seeds])}. {_READ}")  # fmt: skip
    rows, points = [], []
    for factor, values in study.FACTORS.items():
        for name, change in values.items():
            pairs = [(study.case(scale, seed, **change), study.case(scale, seed)) for seed in scale.seeds]
            found = difference(records, pairs)
            rows.append([factor, study.DEFAULTS[factor], name, _cell(found)])
            if found:
                points.append((f"{factor}: {name}", found))
    page.table(["setting", "default", "changed to", "loss − default's"], rows)
    page.figure(_figure(points), "Loss less the default's")
    page.write()


def write_moments(records: Records, scale: Scale, folder: Path) -> None:
    study = moments
    page = Page(study.NAME, "Moments in bf16 and in 8 bits", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records), _READ)
    rows = []
    for dtype, block in study.WEIGHTS:
        reference = [study.case(scale, dtype, block, "float32", seed) for seed in scale.seeds]
        for moment_dtype in study.MOMENTS[1:]:
            pairs = [(study.case(scale, dtype, block, moment_dtype, d.seed), d) for d in reference]
            rows.append([dtype, block, moment_dtype, _mean(records, reference), _cell(difference(records, pairs))])
    page.table(["weights", "blocks", "moments", "loss with fp32 moments", "loss − that"], rows)
    page.write()


def _figure(points: list[tuple[str, Interval]]):
    figure = new_figure(height=0.9 + 0.26 * len(points))
    axes = figure.subplots()
    for place, (_, value) in enumerate(reversed(points)):
        half = 0 if value.num < 2 else value.half
        axes.errorbar(value.mean, place, xerr=half, fmt="o", color="C0", capsize=2, markersize=4)
    axes.axvline(0, color="k", linewidth=0.8, linestyle="--")
    tidy(axes, xlabel="held-out loss − the default's (nats per byte)")
    axes.set_yticks(range(len(points)), [name for name, _ in reversed(points)], fontsize=8)
    return figure
