"""Writes the page of the study at equal time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.studies import equal_time as study
from benchmarks.studies.case import Case
from benchmarks.studies.estimate import feed_forward_weights, linear_weights
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import bold, paired
from benchmarks.studies.reports.made import how_made, parameters
from benchmarks.studies.reports.page import Page, new_figure, tidy
from benchmarks.studies.scale import Scale

_OTHERS = study.DENSE, study.TILES, study.SINGLE
_HEADINGS = [
    "contestant", "width", "weights if dense", "of those in linear layers stored", "time of a step", "steps",
    "bytes of text for each weight", "rate", "seeds", "loss", *(f"less {other.name}" for other in _OTHERS),
]  # fmt: skip
_OF_PERMUTED = ["tiles that cover other units in each layer", "less the same tiles in order"]
_NOTES = (
    "*Rate*: the best factor of the rule's rate; embeddings and norms have the same rate everywhere. *Loss*: the mean "
    "over a contestant's seeds; the differences are paired, over the seeds that both have: mean and 95% interval "
    "(Student's t), in bold where the interval excludes zero; a number without an interval is one seed. A dash is a "
    "run that is still missing."
)


def write(records: Records, scale: Scale, folder: Path) -> None:
    studies = records.path.parent
    page = Page(study.NAME, "Dense and sparse after as much time", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, study.cases(scale, studies), records), _NOTES)
    costs = study.costs(studies)
    page.table(_HEADINGS, [_row(scale, rival, costs[rival.name], records, costs) for rival in study.RIVALS])
    pairs = zip(study.PERMUTED, study.IN_ORDER, strict=True)
    page.table(_OF_PERMUTED, [_permuted_row(scale, pair, records, costs) for pair in pairs])
    page.figure(_figure(scale, costs, records), "Held-out loss over time, of the first seed at the best rate")
    page.write()


def _row(scale: Scale, rival: study.Rival, cost: float, records: Records, costs: dict[str, float]) -> list[str]:
    case = rival.case(scale, study.steps_of(scale, cost))
    weights, found = parameters(case), study.search(scale, rival, cost, records)
    text = case.steps * case.shape.batch * case.shape.sequence / weights
    losses = study.losses(scale, rival, cost, records)
    rate = "—" if found.best is None else f"{found.best:g}" if found.inside else f"{found.best:g}, at the end"
    loss = f"{sum(losses.values()) / len(losses):.4f}" if losses else "—"
    others = [study.losses(scale, other, costs[other.name], records) for other in _OTHERS]
    less = ["" if losses == theirs else bold(paired(losses, theirs)) for theirs in others]
    size = [f"{case.shape.hidden}", f"{weights / 1e6:.2f}M", f"{_stored_share(case):.2f}"]
    run = [f"{cost:.2f}", f"{case.steps}", f"{text:.1f}", rate, f"{len(losses)}"]
    return [rival.name, *size, *run, loss, *less]


def _permuted_row(scale: Scale, pair: tuple[study.Rival, ...], records: Records, costs: dict[str, float]) -> list[str]:
    permuted, in_order = (study.losses(scale, each, costs[each.name], records) for each in pair)
    return [pair[0].name, bold(paired(permuted, in_order))]


def _stored_share(case: Case) -> float:
    """Returns the share of the weights of linear layers that the model stores, but for the output head."""
    every, feed_forward = linear_weights(case.shape), feed_forward_weights(case.shape)
    return 1 - (1 - case.density) * (feed_forward / every if case.sparse == "feed_forward" else 1)


def _figure(scale: Scale, costs: dict[str, float], records: Records) -> Any:
    figure = new_figure(width=7.5, height=4.2)
    axes = figure.subplots()
    for rival in study.RIVALS:
        best = study.search(scale, rival, costs[rival.name], records).best
        if best is None:
            continue
        case = rival.case(scale, study.steps_of(scale, costs[rival.name]), best, scale.seeds[0])
        points = [(step / case.steps, loss) for step, loss in records[case.key]["curve"]]
        axes.plot(*zip(*points, strict=True), "--" if rival is study.DENSE else "-o", markersize=3, label=rival.name)
    tidy(axes, xlabel="share of the time", ylabel="held-out loss (nats per byte)")
    axes.legend(frameon=False, fontsize=8)
    return figure
