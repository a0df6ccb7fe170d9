"""Writes the page of the study at equal memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import equal_memory as study
from benchmarks.studies.contestants import REFERENCE, Fitted, case_of
from benchmarks.studies.estimate import linear_weights
from benchmarks.studies.rates import Search
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import bold, interval, paired
from benchmarks.studies.reports.made import how_made, parameters
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale

_OTHERS = (REFERENCE, "dense, AdamW, bf16", "dense, 8-bit AdamW, bf16")
_HEADINGS = [
    "contestant", "width", "weights", "stored", "bytes of text for each", "MB", "rates", "identifiers", "seeds", "loss",
    *(f"less {other}" for other in _OTHERS),
]  # fmt: skip
_NOTES = (
    "*Weights*: those of the model, active or not; *stored*: those that have a value. Of both it is said how much "
    "text each has read. *MB*: of weights, gradients, states and index. *Rates*: the best factors for linear layers "
    "and for all other parameters; `<` or `>` where one lies at an end of what was tried. Differences are paired by "
    "seed: mean and 95% interval (Student's t), in bold where the interval excludes zero; a number without an interval "
    "is one seed. *Identifiers*: the share that is predicted exactly of identifiers that stood before in the same "
    "window of held-out text. A dash: runs are still missing."
)
_PACKAGES = (
    "GaLore and APOLLO are their authors' code (galore-torch, apollo-torch), 8-bit AdamW and AdamW in bf16 are "
    "torchao's. All round bf16 weights stochastically; around the authors' code this study does it. Ranks: a quarter "
    "of the width, 1 for APOLLO-Mini. Projections are counted."
)
_PEAKS = (
    "The most bytes that tensors hold in an eager step, by torch's allocator, in MB: what is stored, and activations "
    "in windows of the study's length, at micro-batches of 1 and 8 windows, without and with activation checkpointing. "
    "A wide sparse model fits the budget of a narrow dense one until activations count."
)
_TIME = (
    "A step's time is that of compiled steps in one thread, measured by turns with the dense model that sets the "
    "budget (`equal_memory_measured.json`). *Time to the loss*: the time a contestant needs for the loss that this "
    "dense model has after its longer run of the same seed, over that model's, mean and 95% interval over the seeds; "
    "lengths between the two that were run are interpolated in the logarithm of the steps, each length with a schedule "
    "of its own. `<`: the shorter run is below that loss already. `>`: the longer one is not."
)


def write(records: Records, scale: Scale, folder: Path) -> None:
    studies = records.path.parent
    page = Page(study.NAME, "Dense and sparse at equal memory", folder)
    cases = study.cases_of_all_turns(scale, studies)
    page.text(study.__doc__ or "", how_made(study.NAME, cases, records), _NOTES, _PACKAGES)
    results, measured = study.Results(scale, records, study.models(studies)), study.measured(studies)
    for turn in study.tables(scale):
        rivals = results.rivals(turn)
        if not rivals:
            continue
        steps = scale.memory_steps[turn.place]
        page.text(f"## {_budget(results.models, turn.budget)}, {steps:,} steps", _text_read(scale, turn.place))
        page.table(_HEADINGS, [_row(results, rival, turn.place) for rival in rivals])
    page.figure(_curves(results), "Held-out loss over the text that was read, mean of the seeds")
    page.text("## With activations", _PEAKS)
    page.table(*_peaks(results.models, measured))
    page.text("## Equal time", _TIME)
    page.table(["budget", "contestant", "time of a step", "time to the loss"], _times(results, measured))
    page.write()


def _budget(models: dict[tuple[int, str], Fitted], budget: int) -> str:
    """Names a budget by the largest contestant's bytes."""
    return f"{max(each.total for (width, _), each in models.items() if width == budget) / 1e6:.1f} MB"


def _text_read(scale: Scale, place: int) -> str:
    read = scale.memory_steps[place] * scale.memory.batch * scale.memory.sequence
    return f"{read / 1e6:.1f} MB of text."


def _row(results: study.Results, rival: Fitted, place: int) -> list[str]:
    scale, case = results.scale, case_of(rival.shape, rival.name, 1)
    weights = parameters(case)
    stored = weights - round((1 - case.density) * linear_weights(rival.shape))
    text = scale.memory_steps[place] * scale.memory.batch * scale.memory.sequence
    losses = results.losses(rival, place)
    loss = f"{sum(losses.values()) / len(losses):.4f}" if losses else "—"
    others = [results.models.get((rival.budget, name)) for name in _OTHERS]
    differences = [
        bold(paired(losses, results.losses(other, place))) if other and other != rival else "" for other in others
    ]
    counts = [f"{weights / 1e6:.2f}M", f"{stored / 1e6:.2f}M", f"{text / weights:.1f}, {text / stored:.1f}"]
    size = [f"{rival.shape.hidden}", *counts, f"{rival.total / 1e6:.2f}"]
    found = results.search(rival, place)
    quality = [_identifiers(results, rival, place), f"{len(losses)}", loss, *differences]
    return [rival.name, *size, _rates(found), *quality]


def _rates(found: study.Found) -> str:
    if found.best is None:
        return "—"
    return f"{_marked(found.best.linear, found.linear)}, {_marked(found.best.plain, found.plain)}"


def _marked(factor: float, search: Search | None) -> str:
    """Returns the factor, marked where it lies at an end of what was tried."""
    if search is None or search.inside:
        return f"{factor:g}"
    return f"{'>' if search.highest == factor else '<'} {factor:g}"


def _identifiers(results: study.Results, rival: Fitted, place: int) -> str:
    """Returns the mean over the seeds at the best rate."""
    known = [results.records[case.key] for case in results.best_runs(rival, place) if case.key in results.records]
    shares = [record["cloze"]["exact"] for record in known if record["cloze"]]
    return f"{100 * sum(shares) / len(shares):.1f}%" if shares else "—"


def _peaks(
    fitted: dict[tuple[int, str], Fitted], measured: dict[str, dict[str, dict[str, Any]]]
) -> tuple[list[str], list[list[str]]]:
    kinds = ("1", "8", "1, checkpointed", "8, checkpointed")
    stored = ("weights", "gradients", "states and index")
    rows = []
    for (budget, name), each in fitted.items():
        peaks = measured.get(str(budget), {}).get(name, {}).get("peaks", {})
        numbers = [f"{each.bytes[kind] / 1e6:.2f}" for kind in stored]
        rows.append(
            [_budget(fitted, budget), name, *numbers, *(f"{peaks[kind] / 1e6:.1f}" if peaks else "—" for kind in kinds)]
        )
    return ["budget", "contestant", *stored, *(f"peak, batch {kind}" for kind in kinds)], rows


def _times(results: study.Results, measured: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for (budget, name), rival in results.models.items():
        if found := measured.get(str(budget), {}).get(name):
            to_loss = _time_to_loss(results, rival, found["cost"])
            rows.append([_budget(results.models, budget), name, f"{found['cost']:.2f}", to_loss])
    return rows


def _time_to_loss(results: study.Results, rival: Fitted, cost: float) -> str:
    short, long = results.scale.memory_steps
    reference = results.models.get((rival.budget, REFERENCE))
    targets = {} if reference is None else results.losses(reference, 1)
    first, last = (results.losses(rival, place) for place in (0, 1))
    early = sorted(targets.keys() & first.keys())
    if early and _mean(first, early) <= _mean(targets, early):
        return f"< {cost * short / long:.2f}"
    seeds = sorted(targets.keys() & first.keys() & last.keys())
    if not seeds:
        return "—"
    if rival.name == REFERENCE:
        return f"{cost:.2f}"
    if _mean(last, seeds) > _mean(targets, seeds):
        return f"> {cost:.2f}"
    times = [cost * steps_to(targets[seed], (short, first[seed]), (long, last[seed])) / long for seed in seeds]
    return interval(times).format(2, sign=False)


def steps_to(target: float, first: tuple[int, float], last: tuple[int, float]) -> float:
    """Returns the steps at which a line through two (steps, loss) points over log(steps) meets the target."""
    (short, high), (long, low) = first, last
    return short * (long / short) ** ((high - target) / (high - low))


def _mean(losses: dict[int, float], seeds: Sequence[int]) -> float:
    return math.fsum(losses[seed] for seed in seeds) / len(seeds)


def _curves(results: study.Results) -> Any:
    """Draws the held-out loss within the longest runs that a budget has, a panel for each."""
    budgets = sorted({budget for budget, _ in results.models})
    figure = new_figure(height=4.6)
    row = figure.subplots(1, len(budgets), squeeze=False)[0]
    colors = {name: f"C{place % 10}" for place, name in enumerate(study.FIRST)}
    for axes, budget in zip(row, budgets, strict=True):
        place = max((turn.place for turn in study.tables(results.scale) if turn.budget == budget), default=0)
        rivals = {name: results.models[budget, name] for name in colors if (budget, name) in results.models}
        while place and not any(_curve(results, rival, place) for rival in rivals.values()):
            place -= 1
        for name, rival in rivals.items():
            if points := _curve(results, rival, place):
                axes.plot(*zip(*points, strict=True), "-o" if name.startswith("d ") else "--",
                          color=colors[name], markersize=3, label=name)  # fmt: skip
        size = max(rival.total for rival in rivals.values()) / 1e6
        tidy(axes, title=f"{size:.1f} MB, runs of {results.scale.memory_steps[place]:,} steps", xlabel="text read (MB)")
    row[0].set_ylabel("held-out loss (nats per byte)")
    legend_above(figure, row[0], columns=4)
    return figure


def _curve(results: study.Results, rival: Fitted, place: int) -> Sequence[tuple[float, float]]:
    """Returns (MB of text, loss) within the runs of a length, the mean of the seeds."""
    a_step = results.scale.memory.batch * results.scale.memory.sequence / 1e6
    known = [results.records[case.key] for case in results.best_runs(rival, place) if case.key in results.records]
    curves = [record["curve"] for record in known if record["loss"] is not None]
    if not curves:
        return []
    means = [(steps, [curve[i][1] for curve in curves]) for i, (steps, _) in enumerate(curves[0])]
    return [(steps * a_step, math.fsum(values) / len(values)) for steps, values in means]
