"""Writes the page of the study of three sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.studies import cloze
from benchmarks.studies import sizes as study
from benchmarks.studies.case import Case
from benchmarks.studies.estimate import linear_weights
from benchmarks.studies.rates import Search
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import bold, paired
from benchmarks.studies.reports.made import how_made, parameters
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import rate_of

Runs = Callable[[study.Kind, int], Case]
"""Gives the run of a kind and a seed, all else fixed."""

_LOSS, _EXACT, _NATS = "loss", "exact", "nats_per_byte"
_READ = (
    "Losses are means over seeds. Differences are paired by seed, mean and 95% interval over the seeds (Student's t), "
    "in bold where the interval excludes zero, without interval where there is one seed. A dash is a run that is still "
    "missing. *Identifiers*: the share that is predicted exactly, and the nats per byte of identifiers."
)
_HEADINGS = [
    "method", "density", "seeds", "loss", "less dense", "less SMET", "bytes of text per weight", "per active weight",
    "identifiers, %", "less SMET, %", "nats per byte", "less SMET",
]  # fmt: skip


def by_seed(records: Records, scale: Scale, kind: study.Kind, runs: Runs, name: str = _LOSS) -> dict[int, float]:
    """Returns the losses of a kind, or what the cloze test found of it, by seed; a run that diverged has none."""
    found = {}
    for seed in scale.seeds:
        key = runs(kind, seed).key
        if key in records and records[key]["loss"] is not None:
            value = records[key]["loss"] if name == _LOSS else records[key]["cloze"][name]
            if value is not None:
                found[seed] = value
    return found


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Three sizes without tuning", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale, records.path.parent), records), _READ)
    page.text("The cloze test:", cloze.__doc__ or "")
    for size, (shape, steps) in enumerate(scale.sizes):
        runs = _of_size(scale, size)
        weights = parameters(runs(study.DENSE, scale.seeds[0]))
        page.text(
            f"## {weights / 1e6:.1f}M parameters: width {shape.hidden}, {shape.layers} layers",
            f"{steps:,} steps of {shape.batch} windows of {shape.sequence} bytes.",
        )
        page.table(_HEADINGS, [_row(records, scale, kind, runs) for kind in study.KINDS])
    page.text("## Loss of the naive rule less that of SMET, by size")
    page.figure(_figure(records, scale), "Loss of naive methods less SMET's at the same density and rate, by size")
    page.text(
        "## Every method at its own best rate",
        f"Smallest size, density {study.DENSITIES[0]:g}. Held-out losses of seed {scale.seeds[0]} at factors of the "
        "rate; then the best of each method in all seeds.",
    )
    searches = {kind: study.search(scale, kind, records) for kind in study.OF_RATES}
    factors = sorted({each.rate / rate_of(each.shape) for found in searches.values() for each in found.cases})
    page.table(
        ["method", *(f"x {factor:.2f}" for factor in factors), "seeds", "loss at the best", "less dense", "less SMET"],
        [[*_rates(records, scale, kind, factors), *_at_best(records, scale, kind, searches)] for kind in searches],
    )
    page.text("## Other texts", "The smallest size.")
    for text in study.TEXTS:
        page.text(f"`{text}`:")
        page.table(_HEADINGS, [_row(records, scale, kind, _of_text(scale, text)) for kind in study.OF_TEXTS])
    page.write()


def _of_size(scale: Scale, size: int) -> Runs:
    return lambda kind, seed: study.case(scale, size, kind, seed)


def _of_text(scale: Scale, text: str) -> Runs:
    return lambda kind, seed: study.case(scale, 0, kind, seed, text=text)


def _row(records: Records, scale: Scale, kind: study.Kind, runs: Runs) -> list[str]:
    method, density = kind
    case, smet = runs(kind, scale.seeds[0]), ("SMET", density)
    text, weights = case.steps * case.shape.batch * case.shape.sequence, linear_weights(case.shape)
    losses = by_seed(records, scale, kind, runs)

    def less(other: study.Kind, name: str, factor: float = 1.0, digits: int = 4) -> str:
        if kind == other or other not in study.KINDS:
            return ""
        ours, others = (by_seed(records, scale, each, runs, name) for each in (kind, other))
        scaled = [{seed: factor * value for seed, value in each.items()} for each in (ours, others)]
        return bold(paired(*scaled), digits)

    diverged = sum(records[key]["loss"] is None for s in scale.seeds if (key := runs(kind, s).key) in records)
    return [
        method, f"{density:g}", str(len(losses)), _mean(losses) + (f" ({diverged} diverged)" if diverged else ""),
        less(study.DENSE, _LOSS), less(smet, _LOSS), f"{text / weights:.2f}", f"{text / weights / density:.2f}",
        _mean(by_seed(records, scale, kind, runs, _EXACT), 100, 1), less(smet, _EXACT, 100, 1),
        _mean(by_seed(records, scale, kind, runs, _NATS)), less(smet, _NATS),
    ]  # fmt: skip


def _mean(numbers: dict[int, float], factor: float = 1.0, digits: int = 4) -> str:
    return f"{factor * fmean(numbers.values()):.{digits}f}" if numbers else "—"


def _rates(records: Records, scale: Scale, kind: study.Kind, factors: list[float]) -> list[str]:
    keys = [study.case(scale, 0, kind, scale.seeds[0], factor).key for factor in factors]
    losses = [records[key]["loss"] if key in records else None for key in keys]
    best = min((loss for loss in losses if loss is not None), default=None)
    cells = ["" if loss is None else f"**{loss:.4f}**" if loss == best else f"{loss:.4f}" for loss in losses]
    return [kind[0], *cells]


def _at_best(records: Records, scale: Scale, kind: study.Kind, searches: dict[study.Kind, Search]) -> list[str]:
    losses = {each: _best_by_seed(records, scale, each, found.best) for each, found in searches.items()}
    ours, others = losses[kind], (study.DENSE, study.OF_RATES[1])
    less = ["" if kind == other else bold(paired(ours, losses[other])) for other in others]
    return [str(len(ours)), _mean(ours), *(["", ""] if kind == study.DENSE else less)]


def _best_by_seed(records: Records, scale: Scale, kind: study.Kind, best: float | None) -> dict[int, float]:
    if best is None:
        return {}
    return by_seed(records, scale, kind, lambda each, seed: study.case(scale, 0, each, seed, best))


def _figure(records: Records, scale: Scale) -> Any:
    figure = new_figure(height=3.6)
    row = figure.subplots(1, len(study.DENSITIES), sharey=True)
    sizes = [parameters(study.case(scale, size, study.DENSE, 0)) / 1e6 for size in range(len(scale.sizes))]
    for axes, density in zip(row, study.DENSITIES, strict=True):
        for number, method in enumerate(method for method in study.METHODS if method != "SMET"):
            points = []
            for size, millions in enumerate(sizes):
                runs = _of_size(scale, size)
                ours, smet = (by_seed(records, scale, (each, density), runs) for each in (method, "SMET"))
                if found := paired(ours, smet):
                    points.append((millions * (1 + 0.03 * number), found.mean, 0 if found.num < 2 else found.half))
            if points:
                places, means, halves = zip(*points, strict=True)
                axes.errorbar(places, means, yerr=halves, fmt="o-", capsize=3, markersize=4, label=method)
        axes.axhline(0, color="k", linewidth=0.8, linestyle="--")
        tidy(axes, xscale="log", title=f"d = {density:g}", xlabel="parameters of the dense model (millions)")
        axes.set_xticks(sizes, [f"{each:.2g}" for each in sizes])
        axes.set_xticks([], minor=True)
    row[0].set_ylabel("held-out loss − SMET's (nats per byte)")
    legend_above(figure, row[0])
    return figure
