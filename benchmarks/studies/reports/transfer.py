"""Writes the part of the topology page that says whether one base rate holds over densities and widths."""

from __future__ import annotations

from typing import Any

from benchmarks.studies import topology as study
from benchmarks.studies.records import Records
from benchmarks.studies.reports.learning_rate import best_rate
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale

_TEXT = (
    "SμPar (arXiv 2405.15743): peak rates of linear layers by 1 / (d · width), their initial spread by "
    "1 / √(d · width), logits by 1 / width, all relative to the narrowest model. At a fixed width this is p = 1 with "
    "initial values rescaled by 1 / √d, the default of `sparsify` and `ActiveAdamW`. Static single weights, one seed, "
    f"{study.TRANSFER_STEPS:,} steps at every width, so that wide models read less text for each weight than all other "
    "runs on this page. In the table, the best base rate over that of all other runs, by a parabola through the best "
    "factor and its neighbours (an end of the range where it is the best)."
)


def losses(records: Records, scale: Scale, density: float, width: int) -> dict[float, float]:
    """Returns the losses by factor of the base rate."""
    found = {}
    for factor in study.TRANSFER_FACTORS:
        key = study.transfer_run(scale, density, width, factor).key
        if key in records and records[key]["loss"] is not None:
            found[factor] = records[key]["loss"]
    return found


def add(page: Page, records: Records, scale: Scale) -> None:
    """Adds the heading, the table and the picture to the page."""
    page.text("## Does one base rate hold over densities and widths?", _TEXT)
    widths = {width: study.wider(study.for_tiles(scale.replicas), width).hidden for width in study.TRANSFER_WIDTHS}
    rows = []
    for density in study.TRANSFER_DENSITIES:
        found = [losses(records, scale, density, width) for width in widths]
        rows.append([f"d {density:g}", *(f"{best_rate(each):.2f}" if each else "—" for each in found)])
    page.table(["", *(f"width {hidden}" for hidden in widths.values())], rows)
    if any(losses(records, scale, density, width) for density in study.TRANSFER_DENSITIES for width in widths):
        page.figure(_figure(records, scale, widths), "Loss by base rate, density and width", "_transfer")


def _figure(records: Records, scale: Scale, widths: dict[int, int]) -> Any:
    figure = new_figure(height=3.6)
    found_in = {
        width: {density: losses(records, scale, density, width) for density in study.TRANSFER_DENSITIES}
        for width in widths
    }
    drawn = {width: found for width, found in found_in.items() if any(found.values())}
    if not drawn:
        return figure
    row = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (width, by_density) in zip(row, drawn.items(), strict=True):
        hidden = widths[width]
        for density, found in by_density.items():
            axes.plot(list(found), list(found.values()), "o-", markersize=4, label=f"d = {density:g}")
        tidy(axes, xscale="log", title=f"width {hidden}", xlabel="base rate over that of all others")
        axes.set_xticks(study.TRANSFER_FACTORS, [f"{factor:g}" for factor in study.TRANSFER_FACTORS])
        axes.set_xticks([], minor=True)
    row[0].set_ylabel("held-out loss (nats per byte)")
    legend_above(figure, row[0])
    return figure
