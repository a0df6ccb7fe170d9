"""Writes the page of the longer run: time to loss."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import smet_compile as smet
from benchmarks.studies import cloze
from benchmarks.studies import longer as study
from benchmarks.studies.case import Case
from benchmarks.studies.race import FINAL_WINDOWS
from benchmarks.studies.records import Records
from benchmarks.studies.reports.made import how_made, parameters
from benchmarks.studies.reports.page import Page, legend_above, new_figure, tidy
from benchmarks.studies.scale import Scale

_SHARES = (0.25, 0.5, 0.75, 1.0)
_MISSING = "—"
_READ = (
    "One run of each, so that no difference below has an interval: it illustrates, and supports no claim about losses. "
    "Processor time is measured. Losses are in nats per byte of held-out text."
)


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


def runs(records: Records, scale: Scale, folder: Path) -> dict[str, dict]:
    """Returns the records of the longer runs, by model."""
    cases = dict(zip(study.MODELS, study.cases(scale, folder), strict=True))
    return {model: records[case.key] for model, case in cases.items() if case.key in records}


def targets(found: dict[str, dict]) -> list[float]:
    """Returns losses that every model reaches: those of the last one to end, at shares of its run."""
    worst = max(found.values(), key=lambda record: record["curve"][-1][2])["curve"]
    return [min(point[2] for point in worst[: max(2, round(share * len(worst)))]) for share in _SHARES]


def write(records: Records, scale: Scale, folder: Path) -> None:
    beside = records.path.parent
    rates, cases = Records(beside / study.RATES), study.cases(scale, beside)
    page = Page(study.NAME, "A longer run: time to loss", folder)
    page.text(study.__doc__ or "", how_made(study.NAME, cases, records, FINAL_WINDOWS), _READ)
    found = runs(records, scale, beside)
    page.text("## The models")
    page.table(
        _HEADINGS, [_row(model, case, found.get(model)) for model, case in zip(study.MODELS, cases, strict=True)]
    )
    if found:
        page.text(
            "## Time to loss",
            "Losses that the model which ends highest has at a quarter, half, three quarters and the end of its run, "
            "and the processor time and the steps after which each model has them. In brackets the time over that of "
            f"*{study.DENSE}*.",
        )
        page.table(["held-out loss", *found], [_times(found, loss) for loss in targets(found)])
        page.figure(_figure(found), "Held-out loss over the processor time of one thread, and over the text read")
    page.text(
        "## The rates",
        f"Held-out losses after {scale.race.rate_steps} steps at factors of .106 / (width · √d). The beginning of a "
        "run may want a higher rate than the whole of it.",
    )
    swept = {model: study.losses(rates, scale, model) for model in study.MODELS}
    factors = sorted({factor for each in swept.values() for factor in each} | set(study.FACTORS))
    page.table(["", *(f"x {f:g}" for f in factors)], [_sweep(model, swept[model], factors) for model in study.MODELS])
    page.text("## The cloze test", cloze.__doc__ or "")
    page.write()


_HEADINGS = [
    "", "width x layers", "parameters", "stored", "bytes of training state", "seconds a step", "text", "bytes for each "
    "stored parameter", "loss", "identifiers, %", "nats per byte of identifiers",
]  # fmt: skip


def _row(model: str, case: Case, record: dict | None) -> list[str]:
    weights, num_bytes = parameters(case), stored_bytes(case)
    plain = 2 * case.vocabulary * case.shape.hidden + (2 * case.shape.layers + 1) * case.shape.hidden
    stored = plain + case.density * (weights - plain)
    size = [f"{case.shape.hidden} x {case.shape.layers}", f"{weights / 1e6:.1f}M", f"{stored / 1e6:.1f}M"]
    size.append(f"{num_bytes / 1e6:.0f} MB")
    if record is None:
        return [model, *size, *(6 * [_MISSING])]
    text = case.steps * case.shape.batch * case.shape.sequence * record["text"]["bytes_per_token"]
    seconds, found = statistics.median(record["step_seconds"]), record["cloze"]
    return [
        model, *size, f"{seconds:.3f}", f"{text / 1e6:.2f} MB", f"{text / stored:.3f}",
        f"{record['loss']:.4f}", _number(found["exact"], 100, 1), _number(found["nats_per_byte"]),
    ]  # fmt: skip


def _number(value: float | None, factor: float = 1.0, digits: int = 4) -> str:
    return _MISSING if value is None else f"{factor * value:.{digits}f}"


def _times(found: dict[str, dict], loss: float) -> list[str]:
    times = {model: time_to_loss(record["curve"], loss) for model, record in found.items()}
    dense, cells = times.get(study.DENSE), []
    for model, reached in times.items():
        if reached is None:
            cells.append("not reached")
            continue
        ratio = f" ({reached[1] / dense[1]:.2f})" if dense and dense[1] and model != study.DENSE else ""
        cells.append(f"{reached[1]:.0f} s{ratio}, step {reached[0]:.0f}")
    return [f"{loss:.3f}", *cells]


def _sweep(model: str, losses: dict[float, float], factors: list[float]) -> list[str]:
    best = min(losses.values(), default=None)
    cells = []
    for factor in factors:
        loss = losses.get(factor)
        cells.append("" if loss is None else f"**{loss:.4f}**" if loss == best else f"{loss:.4f}")
    return [model, *cells]


def _figure(found: dict[str, dict]) -> Any:
    figure = new_figure(height=3.8)
    by_time, by_text = figure.subplots(1, 2, sharey=True)
    for number, (model, record) in enumerate(found.items()):
        shape = record["case"]["shape"]
        bytes_a_step = shape["batch"] * shape["sequence"] * record["text"]["bytes_per_token"]
        steps, seconds, losses = zip(*record["curve"][1:], strict=True)
        style = {"color": f"C{number}", "linewidth": 1.4, "label": model}
        by_time.plot([each / 60 for each in seconds], losses, **style)
        by_text.plot([each * bytes_a_step / 1e6 for each in steps], losses, **style)
    tidy(by_time, xlabel="processor time (minutes)", ylabel="held-out loss (nats per byte)")
    tidy(by_text, xlabel="text read (MB)")
    legend_above(figure, by_time)
    return figure
