"""Writes the pages of studies that change one setting at a time, as differences from the default by seed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies import moments, sensitivity
from benchmarks.studies.case import Case
from benchmarks.studies.estimate import linear_weights
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import Interval, bold, interval
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, new_figure, tidy
from benchmarks.studies.scale import Scale

_READ = (
    "Differences are paired by seed, mean and 95% interval over the seeds (Student's t), in bold where that excludes "
    "zero."
)


def difference(records: Records, pairs: list[tuple[Case, Case]]) -> Interval | None:
    """Returns the mean difference of losses over (changed, compared) runs; None where there is none yet.

    Pairs of which one run diverged are left out.
    """
    losses = [(_loss(records, changed), _loss(records, compared)) for changed, compared in pairs]
    found = [ours - other for ours, other in losses if ours is not None and other is not None]
    return interval(found) if found else None


def _loss(records: Records, case: Case) -> float | None:
    return records[case.key]["loss"] if case.key in records else None


def _mean(records: Records, cases: list[Case]) -> str:
    losses = [loss for case in cases if (loss := _loss(records, case)) is not None]
    return interval(losses).format(sign=False) if losses else "—"


def text_per_weight(case: Case) -> str:
    """Says how much text a run reads, and how much that is for each weight of the dense model's linear layers."""
    text = case.steps * case.shape.batch * case.shape.sequence
    each = text / linear_weights(case.shape)
    return f"{text / 1e6:.1f} MB of text, {each:.1f} bytes for each weight of linear layers if dense"


def write_sensitivity(records: Records, scale: Scale, folder: Path) -> None:
    study = sensitivity
    page = Page(study.NAME, "Settings of the rule, one at a time", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records))
    page.text(
        f"Density {study.DENSITY:g}, single weights; {text_per_weight(study.case(scale, 0))}. The default's loss: "
        f"{_mean(records, [study.case(scale, seed) for seed in scale.seeds])}. {_READ}"
    )
    rows, points = [], []
    for factor, values in study.FACTORS.items():
        for name, change in values.items():
            pairs = [(study.case(scale, seed, **change), study.case(scale, seed)) for seed in scale.seeds]
            found = difference(records, pairs)
            rows.append([factor, study.DEFAULTS[factor], name, bold(found)])
            if found:
                points.append((f"{factor}: {name}", found))
    page.table(["setting", "default", "changed to", "loss − default's"], rows)
    page.figure(_figure(points), "Loss less the default's")
    page.write()


def write_moments(records: Records, scale: Scale, folder: Path) -> None:
    study = moments
    page = Page(study.NAME, "Moments in bf16 and in 8 bits", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records))
    read = text_per_weight(study.cases(scale)[0])
    page.text(f"Density {study.DENSITY:g}, single weights; {read}. {_READ}")
    rows = []
    for dtype in study.WEIGHTS:
        for moment_dtype in study.MOMENTS:
            runs = _moments(scale, dtype, moment_dtype)
            beside = [_moments(scale, dtype, "float32"), _moments(scale, "float32", "float32")]
            less = [
                "" if runs == others else bold(difference(records, list(zip(runs, others, strict=True))))
                for others in beside
            ]
            rows.append([dtype, moment_dtype, _mean(records, runs), *less])
    page.table(["weights", "moments", "loss", "less fp32 moments", "less fp32 weights and moments"], rows)
    page.write()


def _moments(scale: Scale, dtype: str, moment_dtype: str) -> list[Case]:
    return [moments.case(scale, dtype, moment_dtype, seed) for seed in scale.seeds]


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
