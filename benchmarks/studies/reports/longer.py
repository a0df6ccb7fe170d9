"""Writes the page of the longer run: time to loss."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import smet_compile as smet
from benchmarks.studies import cloze
from benchmarks.studies import longer as study
from benchmarks.studies.case import Case
from benchmarks.studies.race import FINAL_WINDOWS
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import bold, interval, paired
from benchmarks.studies.reports.made import how_made, parameters
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import rate_of

_OTHERS = study.DENSE, study.EQUAL_BYTES
_SHARES = (0.25, 0.5, 0.75, 1.0)
_MISSING = "—"
_READ = (
    "Numbers are means over the seeds, and each seed has its line in the figure. Differences and ratios are paired by "
    "seed: mean and 95% interval (Student's t), in bold where that of a difference excludes zero. Processor time is "
    "measured. Losses are in nats per byte of held-out text."
)
Runs = dict[str, dict[int, dict]]
"""Records by model and seed."""


def time_to_loss(curve: list[list[float]], loss: float) -> tuple[float, float] | None:
    """Returns (steps, seconds) at which a curve first falls to a loss, by straight lines between its points.

    A point of a curve is [step, seconds, loss]. None where it never does.
    """
    previous = None
    for step, seconds, value in curve:
        if value <= loss:
            if previous is None or previous[2] == value:
                return step, seconds
            share = (previous[2] - loss) / (previous[2] - value)
            return previous[0] + share * (step - previous[0]), previous[1] + share * (seconds - previous[1])
        previous = (step, seconds, value)
    return None


def stored_bytes(case: Case) -> int:
    """Counts the bytes of weights, gradients, moments, ages and index, as the planner does."""
    from benchmarks.studies.trainer import build_model

    density = None if case.density == 1 else case.density
    plan = smet.plan(
        build_model(case, "meta"), density, block_shape=case.block_shape, batch=1, sequence=case.shape.sequence,
        compiled=False,
    )  # fmt: skip
    stored = plan.dense.stored if density is None else plan.sparse.stored
    return sum(number for kind, number in stored.items() if kind != "buffers")


def runs(records: Records, scale: Scale) -> Runs:
    """Returns the records at the best rate, by model and seed, but those that diverged."""
    found: Runs = {}
    for model in study.MODELS:
        best = study.search(scale, model, records).best
        keys = {} if best is None else {seed: study.case(scale, model, best, seed).key for seed in scale.seeds}
        ended = {
            seed: records[key] for seed, key in keys.items() if key in records and records[key]["loss"] is not None
        }
        if ended:
            found[model] = ended
    return found


def targets(found: Runs) -> list[float]:
    """Returns losses that every run reaches: those of the one that ends highest, at shares of its length."""
    curves = [record["curve"] for by_seed in found.values() for record in by_seed.values()]
    worst = max(curves, key=lambda curve: float(curve[-1][2]))
    return [min(point[2] for point in worst[: max(2, round(share * len(worst)))]) for share in _SHARES]


def write(records: Records, scale: Scale, folder: Path) -> None:
    page = Page(study.NAME, "A longer run: time to loss", folder)
    cases, found = study.cases(scale, records.path.parent), runs(records, scale)
    page.text(study.__doc__ or "", how_made(study.NAME, cases, records, FINAL_WINDOWS), _READ)
    page.text("## The models")
    page.table(_HEADINGS, [_row(scale, model, found) for model in study.MODELS])
    if found:
        page.text(
            "## Time to loss",
            "Losses that the run which ends highest has at a quarter, half, three quarters and the end of its length, "
            "and the processor time after which each model has them. The last is where that run ends; others end "
            f"lower. In brackets the time over that of *{study.DENSE}*, paired by seed.",
        )
        page.table(["held-out loss", *found], [times_to_loss(found, loss) for loss in targets(found)])
        page.text(
            "The same with any of the rates that were tried, whichever has the loss first, in the first seed; the "
            "factor of the rate in brackets:"
        )
        page.table(["held-out loss", *found], [_first_times(records, scale, found, loss) for loss in targets(found)])
        page.text("## Loss after as much time", "When the first model ends, which is the fastest, by seed.")
        losses = after_as_much_time(found)
        page.table(
            ["", "loss", *(f"less {other}" for other in _OTHERS)],
            [[each, f"{statistics.fmean(ours.values()):.4f}" if ours else _MISSING, *_less(losses, each)]
             for each, ours in losses.items()],
        )  # fmt: skip
        page.figure(_figure(found), "Held-out loss over the processor time of one thread, and over the text read")
    page.text("## The rates", f"Held-out losses of seed {scale.seeds[0]} at factors of .106 / (width · √d).")
    swept = {model: _swept(records, scale, model) for model in study.MODELS}
    factors = sorted({factor for each in swept.values() for factor in each} | set(study.FACTORS))
    page.table(["", *(f"x {f:g}" for f in factors)], [_sweep(model, swept[model], factors) for model in study.MODELS])
    page.text("## The cloze test", cloze.__doc__ or "")
    page.write()


_HEADINGS = [
    "", "width x layers", "parameters", "stored", "bytes of training state", "seconds a step", "text", "bytes for each "
    "stored parameter", "seeds", "loss", *(f"less {other}" for other in _OTHERS),
    "identifiers, %", "nats per byte of identifiers",
]  # fmt: skip


def _row(scale: Scale, model: str, found: Runs) -> list[str]:
    case = study.case(scale, model, 1.0)
    weights, num_bytes = parameters(case), stored_bytes(case)
    plain = 2 * case.vocabulary * case.shape.hidden + (2 * case.shape.layers + 1) * case.shape.hidden
    stored = plain + case.density * (weights - plain)
    size = [f"{case.shape.hidden} x {case.shape.layers}", f"{weights / 1e6:.1f}M", f"{stored / 1e6:.1f}M"]
    size.append(f"{num_bytes / 1e6:.0f} MB")
    if model not in found:
        return [model, *size, *(9 * [_MISSING])]
    ended = list(found[model].values())
    text = case.steps * case.shape.batch * case.shape.sequence * ended[0]["text"]["bytes_per_token"]
    seconds = statistics.fmean(statistics.median(record["step_seconds"]) for record in ended)
    losses = {each: _losses(by_seed) for each, by_seed in found.items()}
    return [
        model, *size, f"{seconds:.3f}", f"{text / 1e6:.2f} MB", f"{text / stored:.3f}", f"{len(ended)}",
        f"{statistics.fmean(losses[model].values()):.4f}", *_less(losses, model),
        _number([record["cloze"]["exact"] for record in ended], 100, 1),
        _number([record["cloze"]["nats_per_byte"] for record in ended]),
    ]  # fmt: skip


def _less(losses: dict[str, dict[int, float]], model: str) -> list[str]:
    """Returns how far a model's losses lie above those of the dense ones."""
    return ["" if model == other else bold(paired(losses[model], losses.get(other, {}))) for other in _OTHERS]


def loss_after(curve: list[list[float]], seconds: float) -> float:
    """Returns the loss after so many seconds, by a straight line between the points beside it, or its last loss."""
    (_, begin, first), *_ = [point for point in reversed(curve) if point[1] <= seconds]
    later = next(((end, last) for _, end, last in curve if end > seconds), None)
    return first if later is None else first + (later[1] - first) * (seconds - begin) / (later[0] - begin)


def after_as_much_time(found: Runs) -> dict[str, dict[int, float]]:
    """Returns by model and seed the losses at the time when the seed's first run ends."""
    seeds = set.intersection(*(set(by_seed) for by_seed in found.values()))
    ends = {seed: min(by_seed[seed]["curve"][-1][1] for by_seed in found.values()) for seed in seeds}
    return {
        model: {seed: loss_after(by_seed[seed]["curve"], end) for seed, end in ends.items()}
        for model, by_seed in found.items()
    }


def _losses(by_seed: dict[int, dict]) -> dict[int, float]:
    return {seed: record["loss"] for seed, record in by_seed.items()}


def _number(values: list[float | None], factor: float = 1.0, digits: int = 4) -> str:
    known = [value for value in values if value is not None]
    return f"{factor * statistics.fmean(known):.{digits}f}" if known else _MISSING


def times_to_loss(found: Runs, loss: float) -> list[str]:
    """Returns the row of a loss: the mean times of the models, each with its ratio to the dense one's by seed."""
    times = {model: _seconds(by_seed, loss) for model, by_seed in found.items()}
    dense, cells = times.get(study.DENSE, {}), []
    for model, by_seed in times.items():
        shares = [seconds / dense[seed] for seed, seconds in by_seed.items() if dense.get(seed)]
        ratio = f" ({interval(shares).format(2, sign=False)})" if shares and model != study.DENSE else ""
        cells.append(f"{statistics.fmean(by_seed.values()):.0f} s{ratio}" if by_seed else "not reached")
    return [f"{loss:.3f}", *cells]


def _seconds(by_seed: dict[int, dict], loss: float) -> dict[int, float]:
    reached = {seed: time_to_loss(record["curve"], loss) for seed, record in by_seed.items()}
    return {seed: each[1] for seed, each in reached.items() if each}


def _first_times(records: Records, scale: Scale, found: Runs, loss: float) -> list[str]:
    cells = []
    for model in found:
        reached = {
            factor: time_to_loss(records[case.key]["curve"], loss)
            for factor, case in _tried(records, scale, model).items()
        }
        first = min(((each[1], factor) for factor, each in reached.items() if each), default=None)
        cells.append(_MISSING if first is None else f"{first[0]:.0f} s (x {first[1]:g})")
    return [f"{loss:.3f}", *cells]


def _tried(records: Records, scale: Scale, model: str) -> dict[float, Case]:
    """Returns the runs of the first seed by the factor of their rate."""
    rule, first = rate_of(study.shape_of(scale, model)), study.search(scale, model, records).cases
    return {round(case.rate / rule, 6): case for case in first if case.key in records}


def _swept(records: Records, scale: Scale, model: str) -> dict[float, float]:
    losses = {factor: records[case.key]["loss"] for factor, case in _tried(records, scale, model).items()}
    return {factor: math.inf if loss is None else loss for factor, loss in losses.items()}


def _sweep(model: str, losses: dict[float, float], factors: list[float]) -> list[str]:
    best = min(losses.values(), default=None)
    cells = []
    for factor in factors:
        loss = losses.get(factor)
        cells.append("" if loss is None else f"**{loss:.4f}**" if loss == best else f"{loss:.4f}")
    return [model, *cells]


def _figure(found: Runs) -> Any:
    figure = new_figure(height=3.8)
    by_time, by_text = figure.subplots(1, 2, sharey=True)
    for number, (model, by_seed) in enumerate(found.items()):
        for seed, record in enumerate(by_seed.values()):
            shape = record["case"]["shape"]
            bytes_a_step = shape["batch"] * shape["sequence"] * record["text"]["bytes_per_token"]
            steps, seconds, losses = zip(*record["curve"][1:], strict=True)
            style = {"color": f"C{number}", "linewidth": 1.2, "label": None if seed else model}
            by_time.plot([each / 60 for each in seconds], losses, **style)
            by_text.plot([each * bytes_a_step / 1e6 for each in steps], losses, **style)
    tidy(by_time, xlabel="processor time (minutes)", ylabel="held-out loss (nats per byte)")
    tidy(by_text, xlabel="text read (MB)")
    legend_above(figure, by_time)
    return figure
