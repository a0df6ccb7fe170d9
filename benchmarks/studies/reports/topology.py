"""Writes the page of the study of topology updates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.studies import topology as study
from benchmarks.studies.records import Records
from benchmarks.studies.replica import Replica
from benchmarks.studies.reports import transfer
from benchmarks.studies.reports.interval import Interval, interval
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page
from benchmarks.studies.scale import Scale

_READ = (
    "Differences are paired by seed: loss of the row less that of the column, mean and 95% interval over the seeds "
    "(Student's t), in bold where the interval excludes zero, without interval where there is one seed. A table has "
    "many rows: of those without any effect one in twenty is in bold by chance. *Newcomers dropped*: the share of what "
    "was dropped that had been grown and was judged for the first time. *Survive*: the share of grown blocks that live "
    "through their first judgement. *New*: the share of the active blocks at the end that were not active at the "
    "start. An empty cell says nothing; a dash is a run that is still missing."
)
_POOLED = (
    "The same difference in several settings, averaged for each seed: a seed counts once. Settings that not all seeds "
    "have are left out. Protection: over densities, ΔT and ζ. Parts of the rule: over the settings of the two other "
    "parts, at the first width."
)
_MISSING = "—"


def losses(records: Records, case: Replica) -> dict[int, float]:
    """Returns the finite losses of a setting, by seed."""
    found = {each.seed: records[each.key]["loss"] for each in study.of_seeds(case) if each.key in records}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def paired(records: Records, case: Replica, reference: Replica) -> Interval | None:
    """Returns the mean difference of two settings over the seeds that both have; None where there is none."""
    ours, others = losses(records, case), losses(records, reference)
    both = ours.keys() & others.keys()
    return interval([ours[seed] - others[seed] for seed in sorted(both)]) if both else None


def movement(records: Records, case: Replica) -> tuple[float, float, float] | None:
    """Returns newcomers among the dropped, survival of newcomers, and the share of the active that is new."""
    keys = [each.key for each in study.of_seeds(case) if each.key in records]
    counts = [records[key]["movement"] for key in keys]
    dropped, first, judged, new, active = (
        sum(each[name] for each in counts)
        for name in ("dropped", "dropped_at_first", "judged", "newly_active", "active")
    )
    if not dropped or not judged:
        return None
    return first / dropped, 1 - first / judged, new / active


def pooled(records: Records, pairs: Sequence[tuple[Replica, Replica]]) -> tuple[Interval, int] | None:
    """Returns the difference averaged over the pairs that all seeds have, and their number; None where there is none.

    Each seed counts once, with its average, since pairs of one seed are not independent.
    """
    found = [(losses(records, case), losses(records, reference)) for case, reference in pairs]
    whole = [(ours, others) for ours, others in found if len(ours) == len(others) == study.NUM_SEEDS]
    if not whole:
        return None
    seeds = range(study.NUM_SEEDS)
    return interval([fmean(ours[seed] - others[seed] for ours, others in whole) for seed in seeds]), len(whole)


def protection_effects(records: Records, scale: Scale) -> dict[str, tuple[Interval, int] | None]:
    """Returns what protection for two updates gains, over all densities, ΔT and ζ that ran."""
    question = study.protection(scale.replicas)
    pairs: dict[str, list[tuple[Replica, Replica]]] = {name: [] for name in question.compared_with}
    for row in question.rows:
        for name, reference in zip(question.compared_with, row.references, strict=True):
            if reference and row.case.min_age == 2 * row.case.every:
                pairs[name].append((row.case, reference))
    return {f"min_age 2ΔT less {name}": pooled(records, each) for name, each in pairs.items()}


def cold_start_effects(records: Records, scale: Scale) -> dict[str, tuple[Interval, int] | None]:
    """Returns what leaving out each part of the rule costs, over the settings of the two others that ran."""
    names = ("age", "W of newcomers", "W of the first blocks")
    return {f"without {name}, less with it": _without(records, scale, place) for place, name in enumerate(names)}


def _without(records: Records, scale: Scale, place: int) -> tuple[Interval, int] | None:
    pairs = []
    for full in (each for each in study.COLD_STARTS if each[place]):
        parts: list[int] = list(full)
        parts[place] = 0
        without = study.cold_start_run(scale.replicas, bool(parts[0]), *parts[1:])
        pairs.append((without, study.cold_start_run(scale.replicas, *full)))
    return pooled(records, pairs)


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Topology updates: settings, rules, patterns", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records), _text_read(scale), _READ)
    for question in study.questions(scale):
        page.text(f"## {question.title}", question.text)
        headings = ["", "loss", *(f"less {name}" for name in question.compared_with), "newcomers dropped", "survive"]
        page.table([*headings, "new"], [_row(records, row) for row in question.rows if _has_begun(records, row)])
        cut = [row.label for row in question.rows if not _has_begun(records, row)]
        if cut:
            page.text(f"Cut, with no run yet: {'; '.join(_grouped(cut))}.")
    page.text("## Taken together", _POOLED)
    effects = protection_effects(records, scale) | cold_start_effects(records, scale)
    page.table(["", "loss", "settings"], [_effect(name, *(value or ())) for name, value in effects.items()])
    transfer.add(page, records, scale)
    page.write()


def _grouped(labels: list[str]) -> list[str]:
    """Joins labels that differ behind their last comma alone: "d 0.1, min_age 0 | min_age 200"."""
    ends: dict[str, list[str]] = {}
    for label in labels:
        start, comma, end = label.rpartition(", ")
        ends.setdefault(start + comma, []).append(end)
    return [start + " | ".join(each) for start, each in ends.items()]


def _has_begun(records: Records, row: study.Row) -> bool:
    return any(case.key in records for case in study.of_seeds(row.case))


def _effect(name: str, value: Interval | None = None, num_settings: int = 0) -> list[str]:
    return [name, _difference(value), str(num_settings)]


def _row(records: Records, row: study.Row) -> list[str]:
    moved = None if row.case.is_dense or not row.case.every else movement(records, row.case)
    differences = ["" if each is None else _difference(paired(records, row.case, each)) for each in row.references]
    shares = ["", "", ""] if moved is None else [f"{share:.2f}" for share in moved]
    return [row.label, _mean(records, row.case), *differences, *shares]


def _mean(records: Records, case: Replica) -> str:
    found = list(losses(records, case).values())
    diverged = sum(each.key in records for each in study.of_seeds(case)) - len(found)
    remark = f" ({diverged} diverged)" if diverged else ""
    seeds = f" ({len(found)} of {study.NUM_SEEDS} seeds)" if 0 < len(found) < study.NUM_SEEDS else ""
    return (f"{sum(found) / len(found):.4f}" if found else _MISSING) + seeds + remark


def _difference(value: Interval | None) -> str:
    if value is None:
        return _MISSING
    return f"**{value.format()}**" if value.excludes_zero else value.format()


def _text_read(scale: Scale) -> str:
    """Describes how much text a run reads for every weight of its linear layers, by shape."""
    runs = {
        (case.shape, case.steps): case
        for question in study.questions(scale)
        for row in question.rows
        for case in (row.case,)
        if not case.is_dense
    }
    parts = []
    for shape, steps in runs:
        weights, text = study.linear_weights(shape), steps * shape.batch * shape.sequence
        parts.append(
            f"width {shape.hidden}: {weights:,} weights in linear layers, {text / 1e6:.2f} MB in {steps:,} steps, "
            f"{text / weights:.0f} bytes for each weight ({text / weights / 0.25:.0f} for each active one at d 0.25)"
        )
    return "Text: " + "; ".join(parts) + "."
