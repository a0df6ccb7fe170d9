"""Writes the page of the learning-rate study."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from benchmarks.studies import learning_rate as study
from benchmarks.studies.case import Case
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import interval
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale

Losses = dict[float, float]
_DIVERGED = 9.0


@dataclass(frozen=True)
class Part:
    """Holds runs with one rate of embeddings and norms: ``plain_rate``, or that of everything else for None."""

    records: Records
    scale: Scale
    plain_rate: float | None
    kinds: tuple[tuple[float, str], ...]  # density, block

    def sparse(self, exponent: float, density: float, block: str) -> Losses:
        """Returns held-out losses by base rate."""
        made = [study.sparse_case(self.scale, r, exponent, density, block, self.plain_rate) for r in study.RATES]
        return self._losses([case.key for case in made])

    def dense(self) -> Losses:
        return self._losses([study.dense_case(self.scale, rate, self.plain_rate).key for rate in study.RATES])

    def _losses(self, keys: list[str]) -> Losses:
        pairs = zip(study.RATES, keys, strict=True)
        return {rate: _loss(self.records[key]) for rate, key in pairs if key in self.records}

    def losses_of_seeds(self, case: Case) -> dict[int, float]:
        keys = {seed: replace(case, seed=seed).key for seed in self.scale.seeds}
        return {seed: _loss(self.records[key]) for seed, key in keys.items() if key in self.records}

    def regrets(self, exponent: float, rate: float) -> list[float]:
        """Returns by block and density how far the loss lies above the lowest that any p and rate reached there."""
        found = []
        for density, block in self.kinds:
            by_exponent = {p: self.sparse(p, density, block) for p in study.EXPONENTS}
            reached = [loss for losses in by_exponent.values() for loss in losses.values()]
            if rate in by_exponent[exponent]:
                found.append(by_exponent[exponent][rate] - min(reached))
        return found


def parts(records: Records, scale: Scale) -> tuple[Part, Part]:
    """Returns the runs with embeddings at a rate of their own, and those at the rate of the linear layers."""
    own = Part(records, scale, study.PLAIN_RATE, study.TUNED)
    return own, Part(records, scale, None, study.ONE_RATE)


def _loss(record: dict) -> float:
    return _DIVERGED if record["loss"] is None else record["loss"]


def best_rate(losses: Losses) -> float:
    """Returns the lowest point of a parabola in log rate through the best rate and its neighbours."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < best < len(rates) - 1:
        return rates[best]
    near = rates[best - 1 : best + 2]
    a, b, _ = numpy.polyfit(numpy.log(near), [losses[rate] for rate in near], 2)
    return float(numpy.exp(-b / (2 * a)))


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Learning rate and density", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records))
    titles = (f"# Embeddings and norms at {study.PLAIN_RATE:g}", "# One rate for all parameters")
    for part, title in zip(parts(records, scale), titles, strict=True):
        _write_part(page, part, f"#{title}")
        if part.plain_rate:
            _write_again(page, part)
    page.write()


def _write_again(page: Page, part: Part) -> None:
    """Writes about other block shapes, and other seeds."""
    rate, exponents = study.OTHER_RATE, study.OTHER_EXPONENTS
    kinds = [(d, block) for block in ("1", *study.OTHER_BLOCKS, "64") for d in study.OTHER_DENSITIES]
    rows = []
    for density, block in kinds:
        cases = [study.sparse_case(part.scale, rate, p, density, block) for p in exponents]
        losses = [part.losses_of_seeds(case) for case in cases]
        means = [interval(list(found.values())).format(sign=False) if found else "—" for found in losses]
        pairs = [losses[1][seed] - losses[0][seed] for seed in losses[0].keys() & losses[1].keys()]
        less = interval(pairs).format() if pairs else "—"
        rows.append([block, f"{density:g}", *means, less])
    page.text(f"All block shapes at α = {rate:g}. {_AGAIN}")
    page.table(["block", "density", *(f"p = {p:g}" for p in exponents), "difference"], rows)
    dense = part.losses_of_seeds(study.dense_case(part.scale, rate))
    if dense:
        page.text(f"Dense at that rate: {interval(list(dense.values())).format(sign=False)}, {len(dense)} seeds.")


def _write_part(page: Page, part: Part, title: str) -> None:
    dense = part.dense()
    if not dense:
        return
    page.text(title, f"Dense is best at α = {best_rate(dense):.2g} (loss {min(dense.values()):.4f}).")
    page.figure(
        _figure(part, dense),
        "Held-out loss by the rate of sparse weights, density and p",
        "" if part.plain_rate else "_one",
    )
    page.text("One base rate for all densities. " + _REGRET)
    page.table(
        ["p", *(f"α = {rate:g}" for rate in study.RATES)],
        [[f"{p:g}", *(_regret(part, p, rate) for rate in study.RATES)] for p in study.EXPONENTS],
    )
    page.text("The best base rate. " + _BEST)
    kinds = sorted(((block, density) for density, block in part.kinds), key=lambda kind: (kind[0], -kind[1]))
    page.table(
        ["block", "density", *(f"p = {p:g}" for p in study.EXPONENTS)],
        [[b, f"{d:g}", *(_best(part.sparse(p, d, b)) for p in study.EXPONENTS)] for b, d in kinds],
    )
    page.text("All losses.")
    rows = [_row([b, f"{d:g}", f"{p:g}"], part.sparse(p, d, b)) for b, d in kinds for p in study.EXPONENTS]
    headings = ["block", "density", "p", *(f"α = {rate:g}" for rate in study.RATES)]
    page.table(headings, [_row(["dense", "1", "—"], dense), *rows])


_REGRET = (
    "Mean over block shapes and densities (in brackets the largest) of how far the loss lies above the lowest that any "
    "p and any rate reached at that block shape and density. A rule is good if its row has a small number at one rate: "
    "that rate then holds whatever the density. Dense is left out of the mean."
)
_AGAIN = (
    "Mean and 95% interval over the seeds where there are several; the difference is p = 1 less p = 0.5, seed by seed. "
    "In this model a layer's matrix of 256 x 256 has 16, 8 and 4 tiles of 16, 32 and 64 on a side."
)
_BEST = (
    "By a parabola through the best of the five and its neighbours; a rate at the edge of the five stands as it is, "
    "marked ≤ or ≥, with the loss there. If p were exactly right, a column would show one rate, the dense model's."
)


def _regret(part: Part, exponent: float, rate: float) -> str:
    found = part.regrets(exponent, rate)
    return f"{statistics.fmean(found):.3f} ({max(found):.3f})" if found else "—"


def _best(losses: Losses) -> str:
    if not losses:
        return "—"
    rate = best_rate(losses)
    mark = "≤ " if rate == min(study.RATES) else "≥ " if rate == max(study.RATES) else ""
    return f"{mark}{rate:.2g} ({min(losses.values()):.4f})"


def _row(label: list[str], losses: Losses) -> list[str]:
    return label + [f"{losses[rate]:.4f}" if rate in losses else "—" for rate in study.RATES]


def _figure(part: Part, dense: Losses):
    """Draws losses over the rate of sparse weights, where the curves of all p meet and have their minima inside."""
    figure = new_figure(height=5.8)
    sparse = [part.sparse(exponent, *kind) for kind in part.kinds for exponent in study.EXPONENTS]
    lowest = min(loss for losses in (dense, *sparse) for loss in losses.values())
    densities = sorted({density for density, _ in part.kinds}, reverse=True)
    grid = figure.subplots(len(study.BLOCKS), len(densities), sharex=True, sharey=True, squeeze=False)
    for row, block in zip(grid, study.BLOCKS, strict=True):
        for axes, density in zip(row, densities, strict=True):
            if (density, block) not in part.kinds:
                axes.set_axis_off()
                continue
            axes.plot(list(dense), list(dense.values()), "k--", linewidth=1, label="dense")
            for exponent in study.EXPONENTS:
                losses = part.sparse(exponent, density, block)
                rates = [rate / density**exponent for rate in losses]
                axes.plot(rates, list(losses.values()), "o-", markersize=3, label=f"p = {exponent:g}")
            kind = "single weights" if block == "1" else f"tiles of {block}"
            tidy(axes, xscale="log", title=f"{kind}, d = {density:g}", ylim=(lowest - 0.05, lowest + 0.8))
            axes.tick_params(axis="x", labelsize=7)
    legend_above(figure, grid[0, 0])
    figure.supxlabel("rate of the sparse weights, α / d^p (dense: α)")
    figure.supylabel("held-out loss (nats per byte)")
    return figure
