"""Writes the page of the study at equal memory."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.studies import equal_memory as study
from benchmarks.studies.case import Case
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import Interval, interval
from benchmarks.studies.reports.made import how_made
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale

_HEADINGS = [
    "model",
    "width x layers",
    "weights if dense",
    "bytes of text for each",
    "bytes",
    "step time",
    "loss, same tokens",
    "loss, same time",
]


def best(records: Records, cases: list[Case]) -> float | None:
    """Returns the lowest loss of all rates, once all were tried; a run that diverged has none."""
    if any(case.key not in records for case in cases):
        return None
    losses = [records[case.key]["loss"] for case in cases]
    return min((loss for loss in losses if loss is not None), default=None)


def over_seeds(records: Records, scale: Scale, budget: int) -> Interval | None:
    """Returns the loss of single weights at density .25 less the dense model's, after the same tokens."""
    dense, sparse = (c for c in study.candidates(scale) if c.budget == budget and study.is_main(scale, c))
    pairs = [[best(records, study.same_tokens(scale, c, seed)) for c in (sparse, dense)] for seed in scale.seeds]
    found = [a - b for a, b in pairs if a is not None and b is not None]
    return interval(found) if found else None


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "Dense and sparse at equal memory", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale, records.path.parent), records))
    measured = study.times(records.path.parent)
    panels, points = {}, []
    for budget in scale.budgets:
        rivals = [c for c in study.candidates(scale) if c.budget == budget]
        rows, bars = [], []
        for rival in rivals:
            cost = measured[str(budget)][rival.name]
            tokens = best(records, study.same_tokens(scale, rival, scale.seeds[0]))
            time = best(records, study.same_time(scale, rival, cost, scale.seeds[0]))
            rows.append(_row(rival, scale, cost, tokens, time))
            bars.append((_name(rival), tokens, time))
            points += [(rival, tokens)] if tokens else []
        page.text(f"## Budget: a dense model of width {budget}, {max(r.num_bytes for r in rivals) / 1e6:.1f} MB")
        page.table(_HEADINGS, rows)
        if difference := over_seeds(records, scale, budget):
            page.text(f"Single weights at density 0.25 less dense, same tokens, {difference.num} seeds: "
                      f"{difference.format(3)}.")  # fmt: skip
        panels[budget] = bars
    page.figure(_figure(panels), "Held-out loss of all models of a budget")
    page.figure(
        _by_bytes(points, scale), "Held-out loss after the same tokens, by bytes of training state", "_by_bytes"
    )
    page.write()


def _name(rival: study.Candidate) -> str:
    return f"dense, {rival.shape.layers} layers" if rival.density == 1 else _kind(rival.density, rival.block)


def _kind(density: float, block: str) -> str:
    if density == 1:
        return "dense"
    return f"d = {density:g}, {'single weights' if block == '1' else f'tiles of {block}'}"


def _row(rival: study.Candidate, scale: Scale, cost: float, tokens: float | None, time: float | None) -> list[str]:
    from benchmarks.studies.reports.made import parameters

    weights = parameters(Case(shape=rival.shape, steps=1, rate=1e-3))
    losses = ["—" if each is None else f"{each:.4f}" for each in (tokens, time)]
    text = scale.memory_steps * rival.shape.sequence * rival.shape.batch / weights
    size = f"{rival.shape.hidden} x {rival.shape.layers}"
    stored = f"{rival.num_bytes / 1e6:.2f} MB"
    return [_name(rival), size, f"{weights / 1e6:.2f}M", f"{text:.1f}", stored, f"{cost:.2f}", *losses]


def _by_bytes(points: list[tuple[study.Candidate, float]], scale: Scale):
    """Draws, for models of the budgets' depth, the loss after the same tokens over the bytes of training."""
    figure = new_figure(width=6.5, height=3.8)
    axes = figure.subplots()
    for block, density in [("1", 1.0), *itertools.product(study.BLOCKS, study.DENSITIES)]:
        found = [
            (rival.num_bytes / 1e6, loss)
            for rival, loss in points
            if (rival.density, rival.block, rival.shape.layers) == (density, block, scale.large.layers)
        ]
        if not found:
            continue
        style = "k--o" if density == 1 else "-o" if block == "1" else ":s"
        color = {} if density == 1 else {"color": f"C{study.DENSITIES.index(density)}"}
        axes.plot(*zip(*found, strict=True), style, markersize=4, label=_kind(density, block), **color)
    tidy(axes, xlabel="weights, gradients, moments, ages, index (MB)", ylabel="held-out loss (nats per byte)")
    legend_above(figure, axes, columns=3)
    return figure


def _figure(panels: dict[int, list[tuple[str, float | None, float | None]]]):
    figure = new_figure(height=4.2)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (budget, bars) in zip(row, panels.items(), strict=True):
        for place, (_, *found) in enumerate(reversed(bars)):
            for each, color, shift in zip(found, ("C0", "C1"), (0.12, -0.12), strict=True):
                if each is not None:
                    axes.plot(each, place + shift, "o", color=color, markersize=4)
        axes.set_yticks(range(len(bars)), [name for name, *_ in reversed(bars)], fontsize=8)
        tidy(axes, title=f"budget: dense width {budget}", xlabel="held-out loss (nats per byte)")
    for label, color in (("same tokens", "C0"), ("same time", "C1")):
        row[0].plot([], [], "o", color=color, label=label, markersize=4)
    legend_above(figure, row[0])
    return figure
