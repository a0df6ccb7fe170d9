"""The page of the learning-rate study."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy

from benchmarks.studies import learning_rate as study
from benchmarks.studies.records import Records
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, new_figure, tidy
from benchmarks.studies.scale import Scale

Losses = dict[float, float]
_DIVERGED = 9.0


def losses_of(records: Records, scale: Scale, exponent: float, density: float, block: str) -> Losses:
    """Held-out loss by base rate."""
    made = {rate: study.sparse_case(scale, rate, exponent, density, block).key for rate in study.RATES}
    return {rate: _loss(records[key]) for rate, key in made.items() if key in records}


def dense_losses(records: Records, scale: Scale) -> Losses:
    made = {rate: study.dense_case(scale, rate).key for rate in study.RATES}
    return {rate: _loss(records[key]) for rate, key in made.items() if key in records}


def _loss(record: dict) -> float:
    return _DIVERGED if record["loss"] is None else record["loss"]


def best_rate(losses: Losses) -> float:
    """The lowest point of a parabola in log rate through the best rate and its neighbours."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < best < len(rates) - 1:
        return rates[best]
    near = rates[best - 1 : best + 2]
    a, b, _ = numpy.polyfit(numpy.log(near), [losses[rate] for rate in near], 2)
    return float(numpy.exp(-b / (2 * a)))


def regrets(records: Records, scale: Scale, exponent: float, rate: float) -> list[float]:
    """By density and block, how far the loss lies above the lowest that any p and rate reached there."""
    found = []
    for block in study.BLOCKS:
        for density in study.DENSITIES:
            by_exponent = {p: losses_of(records, scale, p, density, block) for p in study.EXPONENTS}
            reached = [loss for losses in by_exponent.values() for loss in losses.values()]
            if rate in by_exponent[exponent]:
                found.append(by_exponent[exponent][rate] - min(reached))
    return found


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Learning rate and density", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records))
    dense = dense_losses(records, scale)
    best = best_rate(dense)
    page.text(f"The dense model is best at α = {best:.2g} (loss {min(dense.values()):.4f}).")
    page.figure(_figure(records, scale, dense), "Held-out loss by base rate, density and p")
    page.text("## One base rate for all densities", _REGRET)
    page.table(
        ["p", *(f"α = {rate:g}" for rate in study.RATES)],
        [[f"{p:g}", *(_regret(records, scale, p, rate) for rate in study.RATES)] for p in study.EXPONENTS],
    )
    page.text("## The best base rate", _BEST)
    page.table(
        ["block", "density", *(f"p = {p:g}" for p in study.EXPONENTS)],
        [[block, f"{density:g}", *_bests(records, scale, density, block)]
         for block in study.BLOCKS for density in study.DENSITIES],
    )  # fmt: skip
    page.text("## All losses")
    page.table(["block", "density", "p", *(f"α = {rate:g}" for rate in study.RATES)], _all(records, scale, dense))
    page.write()


_REGRET = (
    "Mean over the two block shapes and three densities (in brackets the largest) of how far the loss lies above the "
    "lowest that any p and any rate reached at that block shape and density. A rule is good if its row has a small "
    "number at one rate: that rate then holds whatever the density."
)
_BEST = (
    "By a parabola through the best of the five and its neighbours; a rate at the edge of the five stands as it is, "
    "marked ≤ or ≥, with the loss there. If p were exactly right, a column would show one rate, the dense model's."
)


def _regret(records: Records, scale: Scale, exponent: float, rate: float) -> str:
    found = regrets(records, scale, exponent, rate)
    return f"{statistics.fmean(found):.3f} ({max(found):.3f})" if found else "—"


def _bests(records: Records, scale: Scale, density: float, block: str) -> list[str]:
    cells = []
    for exponent in study.EXPONENTS:
        losses = losses_of(records, scale, exponent, density, block)
        if not losses:
            cells.append("—")
            continue
        rate = best_rate(losses)
        mark = "≤ " if rate == min(study.RATES) else "≥ " if rate == max(study.RATES) else ""
        cells.append(f"{mark}{rate:.2g} ({min(losses.values()):.4f})")
    return cells


def _all(records: Records, scale: Scale, dense: Losses) -> list[list[str]]:
    def row(label: list[str], losses: Losses) -> list[str]:
        return label + [f"{losses[rate]:.4f}" if rate in losses else "—" for rate in study.RATES]

    kinds = [(b, d, p) for b in study.BLOCKS for d in study.DENSITIES for p in study.EXPONENTS]
    rows = [row([b, f"{d:g}", f"{p:g}"], losses_of(records, scale, p, d, b)) for b, d, p in kinds]
    return [row(["dense", "1", "—"], dense), *rows]


def _figure(records: Records, scale: Scale, dense: Losses):
    figure, lowest = new_figure(height=5.5), min(dense.values())
    grid = figure.subplots(len(study.BLOCKS), len(study.DENSITIES), sharex=True, sharey=True, squeeze=False)
    for row, block in zip(grid, study.BLOCKS, strict=True):
        for axes, density in zip(row, study.DENSITIES, strict=True):
            axes.plot(list(dense), list(dense.values()), "k--", linewidth=1, label="dense")
            for exponent in study.EXPONENTS:
                losses = losses_of(records, scale, exponent, density, block)
                axes.plot(list(losses), list(losses.values()), "o-", markersize=3, label=f"p = {exponent:g}")
            kind = "single weights" if block == "1" else f"tiles of {block}"
            tidy(axes, xscale="log", title=f"{kind}, d = {density:g}", ylim=(lowest - 0.05, lowest + 0.8))
            axes.set_xticks(study.RATES, [f"{rate:g}" for rate in study.RATES], fontsize=7)
            axes.set_xticks([], minor=True)
    grid[0, 0].legend(fontsize=8)
    figure.supxlabel("base rate α")
    figure.supylabel("held-out loss (nats per byte)")
    return figure
