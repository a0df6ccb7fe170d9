"""Writes the page of the study of quality."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from benchmarks.studies import quality as study
from benchmarks.studies.records import Records
from benchmarks.studies.reports.differences import difference
from benchmarks.studies.reports.interval import Interval, interval
from benchmarks.studies.reports.made import how_made, parameters
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import RATE_FACTORS

# Perplexity over dense at d = .5, .25, .1 after one epoch, by model size: scaling law of the method's group
# (repository of arXiv 2606.01155).
LAW = {
    "120M": {0.5: 1.030, 0.25: 1.110, 0.1: 1.30},
    "240M": {0.5: 1.024, 0.25: 1.089, 0.1: 1.24},
    "960M": {0.5: 1.015, 0.25: 1.054, 0.1: 1.14},
}
DENSITIES = sorted(study.DENSITIES, reverse=True)
KINDS = {"1": "single weights", "1x16": "runs of 16", "16": "tiles of 16", "32": "tiles of 32", "64": "tiles of 64"}


def excess(records: Records, scale: Scale, density: float, block: str, **options) -> Interval | None:
    """Returns the held-out loss above the dense model's of the same seed, over the seeds."""
    return difference(records, [(study.sparse_case(scale, density, block, seed, **options),
                                  study.dense_case(scale, seed)) for seed in scale.seeds])  # fmt: skip


def long_excess(records: Records, scale: Scale, density: float, block: str) -> Interval | None:
    """Returns the same for the long runs."""
    return difference(records, [(study.long_case(scale, density, block, seed),
                                  study.long_case(scale, 1.0, "1", seed)) for seed in scale.seeds])  # fmt: skip


def active(records: Records, scale: Scale, density: float, block: str) -> str:
    key = study.sparse_case(scale, density, block, scale.seeds[0]).key
    return f"{records[key]['density']:.3f}" if key in records else "—"


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Quality by density and block shape", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale), records))
    dense = [records[k]["loss"] for k in (study.dense_case(scale, s).key for s in scale.seeds) if k in records]
    page.text(f"Dense: {interval(dense).format(sign=False)} (mean and 95% interval of {len(dense)} seeds). {_READ}")
    page.figure(_figure(records, scale), "Held-out loss above dense, by density and block shape")
    page.text("## Block shapes")
    page.table(
        ["blocks", *(f"d = {d:g}" for d in DENSITIES), "active, read back"],
        [[name, *(_cell(excess(records, scale, d, block)) for d in DENSITIES),
          ", ".join(active(records, scale, d, block) for d in DENSITIES)] for block, name in KINDS.items()],
    )  # fmt: skip
    page.text("## By active tiles in a row", _IN_A_ROW)
    page.table(
        ["active tiles in a row", "tile", "density", "above dense", "above single weights"], _in_a_row(records, scale)
    )
    page.text("## Distribution, growth, and a topology that never moves", "Single weights, seed 0.")
    rows = {"uniform, random growth": {}} | study.VARIANTS
    page.table(["", f"d = {study.VARIED:g}"], [_variant(records, scale, *row) for row in rows.items()])
    page.text("## Where tiles start", _EVEN)
    page.table(
        ["tiles", "even, above dense", "by chance, above dense", "by chance less even"],
        [[block, *(_cell(excess(records, scale, study.VARIED, block, even=even)) for even in (True, False)),
          _cell(_less(records, scale, (study.VARIED, block), (study.VARIED, block), even=False))]
         for block in study.TILES],
    )  # fmt: skip
    page.text("## Where the number of weights counts", f"{_long_runs(scale)} {_LONG}")
    page.table(
        ["blocks", *(f"d = {d:g}" for d in DENSITIES)],
        [[name, *(_cell(long_excess(records, scale, d, block)) for d in DENSITIES)]
         for block, name in KINDS.items() if block in {b for _, b in study.LONG}],
    )  # fmt: skip
    factors = sorted((*RATE_FACTORS, 1.0))
    page.text(_AT_RATES)
    page.table(
        ["", *(f"x {factor:.2f}" for factor in factors)],
        [[name, *_at_rates(records, scale, kind, factors)]
         for name, kind in zip(("dense", "single weights, d = 0.25"), study.AT_RATES, strict=True)],
    )  # fmt: skip
    page.text("## Beside the published law", _LAW)
    ours = ["here, short runs", *(_ratio(excess(records, scale, d, "1")) for d in DENSITIES)]
    ours_long = ["here, long runs", *(_ratio(long_excess(records, scale, d, "1")) for d in DENSITIES)]
    per_token = ["here, long runs, to the fourth", *(_ratio(long_excess(records, scale, d, "1"), 4) for d in DENSITIES)]
    law = [[size, *(f"{ratios[d]:.3f}" for d in DENSITIES)] for size, ratios in LAW.items()]
    page.table(
        ["perplexity over dense, single weights", *(f"d = {d:g}" for d in DENSITIES)],
        [ours, ours_long, per_token, *law],
    )
    page.write()


_READ = (
    "The tables give the loss above the dense model's of the same seed, mean and 95% interval over the seeds (no "
    "interval: one seed)."
)
_IN_A_ROW = (
    "The same runs, sorted by the number of active tiles in a row of tiles of the square matrices: density times width "
    "over side. Tiles of 64 ran with p = 0.5, all others with p = 1 (the learning-rate study)."
)
_EVEN = (
    "Tiles start, and grow, such that all rows and all columns of tiles hold equally many; beside it a start in which "
    "every choice is equally likely and rows may stay empty: units that are dead. In this model tiles of 16, 32 "
    "and 64 make grids of 16, 8 and 4 tiles on a side; in one of width 2,048 tiles of 64 make 32."
)
_LONG = (
    "In so small a model, which reads so much for every weight, the number of weights counts; width, length and bytes "
    "differ from the runs above all at once. The rate of linear layers is .106 / (d · width), newcomers are protected "
    "for two updates, and tiles stay where they are."
)
_AT_RATES = "Their losses at factors of that rate, seed 0:"
_LAW = (
    "The law is for perplexity per token of models a hundred times as large; a token is about four bytes, so a ratio "
    "per byte here is about the fourth root of one per token: its fourth power stands in the third row. What can be "
    "compared is the order and the growth with falling density."
)


def _in_a_row(records: Records, scale: Scale) -> list[list[str]]:
    rows = []
    for block in study.TILES:
        for density in DENSITIES:
            number = density * scale.large.hidden / int(block)
            above = excess(records, scale, density, block), _less(records, scale, (density, block), (density, "1"))
            rows.append((number, [f"{number:.1f}", block, f"{density:g}", *(_cell(each) for each in above)]))
    return [row for _, row in sorted(rows, key=lambda each: -each[0])]


def _less(
    records: Records, scale: Scale, kind: tuple[float, str], other: tuple[float, str], **options
) -> Interval | None:
    """Returns the loss of a density and block shape, with ``options``, less that of another without."""
    pairs = [
        (study.sparse_case(scale, *kind, seed, **options), study.sparse_case(scale, *other, seed))
        for seed in scale.seeds
    ]
    return difference(records, pairs)


def _cell(value: Interval | None) -> str:
    return "—" if value is None else value.format(3)


def _ratio(value: Interval | None, power: int = 1) -> str:
    return "—" if value is None else f"{math.exp(power * value.mean):.3f}"


def _long_runs(scale: Scale) -> str:
    case = study.long_case(scale, 1.0, "1", 0)
    num_bytes, num_weights = case.steps * case.shape.batch * case.shape.sequence, parameters(case)
    return (
        f"A model of {num_weights / 1e6:.2f}M parameters (hidden {case.shape.hidden}, {case.shape.layers} layers) that "
        f"reads {num_bytes / 1e6:.1f} MB of text, {num_bytes / num_weights:.0f} bytes for each."
    )


def _at_rates(records: Records, scale: Scale, kind: tuple[float, str], factors: list[float]) -> list[str]:
    keys = [study.long_case(scale, *kind, scale.seeds[0], factor).key for factor in factors]
    losses = [records[key]["loss"] if key in records else None for key in keys]
    return ["—" if loss is None else f"{loss:.4f}" for loss in losses]


def _variant(records: Records, scale: Scale, name: str, options: dict) -> list[str]:
    return [name, _cell(excess(records, _first(scale), study.VARIED, "1", **options))]


def _first(scale: Scale) -> Scale:
    return replace(scale, seeds=scale.seeds[:1])


def _figure(records: Records, scale: Scale):
    figure = new_figure(width=7)
    axes = figure.subplots()
    for block, name in KINDS.items():
        points = [(d, excess(records, scale, d, block)) for d in DENSITIES]
        points = [(d, e) for d, e in points if e is not None]
        halves = [0 if math.isinf(e.half) else e.half for _, e in points]
        axes.errorbar([d for d, _ in points], [e.mean for _, e in points], halves, fmt="o-", capsize=2, label=name)
    axes.axhline(0, color="k", linewidth=0.8, linestyle="--")
    tidy(axes, xscale="log", xlabel="density", ylabel="held-out loss above dense (nats per byte)", xticks=DENSITIES)
    axes.set_xticks([], minor=True)
    axes.set_xticklabels([f"{d:g}" for d in DENSITIES])
    legend_above(figure, axes)
    return figure
