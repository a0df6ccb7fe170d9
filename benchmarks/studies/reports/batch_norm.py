"""Writes the page of the study of batch norm."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.studies.batch_norm import runs, skew
from benchmarks.studies.batch_norm.runs import FRESH_SEEDS, GROWTHS, SWEEP_SEEDS, Run
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import interval
from benchmarks.studies.reports.page import Page

COMMAND = "python -m benchmarks.studies.batch_norm"


def write(records: Records, folder: Path) -> None:
    """Writes every part for which there are records."""
    page = Page("batch_norm", "Batch norm: skewed gradients and their correction", folder)
    page.text(INTRODUCTION, "## The skew", SKEW)
    page.table(["norm", "initialisation", "fresh", "after 200 steps"], _skew_rows(records))
    page.text("![Gradient over fan-in](figures/batch_norm_skew.png)", "### Without batch norm", WITHOUT)
    page.table(
        ["held at its start", "gradient", "outgoing weights", "gradient over them", "output"], _held_rows(records)
    )
    page.text("## Training", TRAINING, "### Rates", RATES_TEXT)
    page.table(["", *(f"{rate:g}" for rate in _rates(records)), "best"], _sweep_rows(records))
    page.text("### With and without, each at its best rate", PAIRS)
    page.table(["density", "growth", "pairs", *_epochs(), "ITOP"], _pair_rows(records))
    page.text(FINDINGS, "### At a rate that was tuned for neither", UNTUNED)
    page.table(["density", "growth", "pairs", *_epochs(), "ITOP"], _untuned_rows(records))
    page.text("## Dense", DENSE)
    page.table(["", "runs", "steps", "held-out accuracy, %", "training loss, last epoch"], _dense_rows(records))
    trained = [record for record in records if record["key"].startswith("train")]
    hours = sum(record["seconds"] for record in trained) / 3600
    page.text(DENSE_FINDINGS, f"{len(trained)} runs, {hours:.1f} hours of one thread. torch {torch.__version__}.")
    page.write()


def _range(numbers: Sequence[float]) -> str:
    return f"{statistics.fmean(numbers):+.2f} ({min(numbers):+.2f} to {max(numbers):+.2f})"


def _skew_rows(records: Records) -> list[list[str]]:
    rows = []
    for start, norm in itertools.product(skew.STARTS, skew.NORMS):
        cases = [skew.Case(norm, start, steps) for steps in skew.STEPS]
        rows.append([norm, start, *(_range(records[case.key]["exponents"]) for case in cases)])
    return rows


def _held_rows(records: Records) -> list[list[str]]:
    rows = []
    for held in skew.HELD:
        record = records[skew.Case("layer norm", skew.STARTS[0], skew.STEPS[1], held).key]
        rows.append([held, *(_range(record[part]) for part in ("exponents", "outgoing", "apart", "output"))])
    return rows


def _finished(records: Records, made: Sequence[Run]) -> bool:
    return all(run.key in records for run in made)


def _rates(records: Records) -> list[float]:
    return sorted({rate for side in runs.sides() for rate in runs.tried_rates(records, *side)})


def _sweep_rows(records: Records) -> list[list[str]]:
    rows = []
    best = runs.tuned(records)
    for density, growth, corrects in runs.sides():
        cells = []
        for rate in _rates(records):
            made = runs.sweep(density, growth, corrects, [rate])
            ends = [100 * records[run.key]["accuracies"][-1] for run in made] if _finished(records, made) else []
            cells.append(f"{statistics.fmean(ends):.1f} ({min(ends):.1f}-{max(ends):.1f})" if ends else "")
        rate_found = best.get((growth, corrects))
        rows.append([_name(growth, corrects), *cells, "" if rate_found is None else f"{rate_found:g}"])
    return rows


def _name(growth: str | None, corrects: bool) -> str:
    return "dense" if growth is None else f"{growth}, {'corrected' if corrects else 'not corrected'}"


def _epochs() -> list[str]:
    return [f"epoch {number}" for number in range(1, 7)]


def _pair_rows(records: Records) -> list[list[str]]:
    rates = runs.tuned(records)
    if len(rates) < len(runs.sides()):
        return []
    rows = []
    for density, growth in itertools.product(runs.DENSITIES, GROWTHS):
        sides = [
            [Run(density, growth, corrects, rates[growth, corrects], seed) for seed in FRESH_SEEDS]
            for corrects in (False, True)
        ]
        rows += _compared(records, density, growth, sides)
    return rows


def _untuned_rows(records: Records) -> list[list[str]]:
    rows = []
    for density, growth in itertools.product(runs.DENSITIES, GROWTHS):
        sides = [[Run(density, growth, corrects, 0.1, seed) for seed in SWEEP_SEEDS] for corrects in (False, True)]
        rows += _compared(records, density, growth, sides)
    return rows


def _compared(records: Records, density: float, growth: str, sides: list[list[Run]]) -> list[list[str]]:
    """Returns the row of a comparison over the seeds of which both runs are there; none where there are no such."""
    pairs = [
        [records[run.key] for run in pair]
        for pair in zip(*sides, strict=True)
        if all(run.key in records for run in pair)
    ]
    if not pairs:
        return []
    cells = []
    for epoch in range(6):
        plain = statistics.fmean(100 * pair[0]["accuracies"][epoch] for pair in pairs)
        gain = interval([100 * (b["accuracies"][epoch] - a["accuracies"][epoch]) for a, b in pairs])
        cells.append(f"{plain:.1f}, {gain.format(1)}")
    itop = ", ".join(f"{statistics.fmean(pair[side]['itop'] for pair in pairs):.3f}" for side in (0, 1))
    return [[f"{density:g}", growth, str(len(pairs)), *cells, itop]]


def _dense_rows(records: Records) -> list[list[str]]:
    if (None, False) not in runs.tuned(records):
        return []
    rows = []
    for name, made in runs.dense_runs(records).items():
        done = [records[run.key] for run in made if run.key in records]
        if not done:
            continue
        ends = [100 * record["accuracies"][-1] for record in done]
        accuracy = interval(ends).format(1, sign=False)
        steps = made[0].epochs * (made[0].num_images // runs.BATCH)
        losses = [record["losses"][-1] for record in done]
        rows.append([name, str(len(done)), f"{steps:,}", accuracy, f"{statistics.fmean(losses):.3f}"])
    return rows


INTRODUCTION = f"""What batch norm does to the gradients of rows with different fan-in, and whether correcting them
helps ([how it works](../batch_norm.md)). Made by `{COMMAND} skew`,
`{COMMAND} train` and `{COMMAND} page`; records:
`docs/results/studies/batch_norm.jsonl`."""
SKEW = """The hidden layer of a small network has 192 rows of 4 to 96 active weights. The table shows the exponent a in
rms(gradient of a row) ∝ fan-in^a, fitted by least squares, mean and range of three seeds; SparseOpt's derivation says
-0.5 under batch norm. With dense fan-in initialisation the weights of all rows have one variance, as those of a dense
layer that was made sparse. With active fan-in initialisation those of a row begin with the variance 2/k, so that all
outputs have one size and the skew is absent at the start."""
WITHOUT = """Without batch norm rows of many weights get the larger gradients after 200 steps, where the initialisation
gives them the larger outputs: each outgoing weight of a unit has a gradient in proportion to the unit's output, so that
training makes the outgoing weights of large units larger, and through these the gradient comes back. With the layer
after it held at its start most of the exponent is gone, with the norm's scale held as well all of it, while holding the
hidden layer itself changes nothing: it is a matter of learned importance, not of the norm, and the correction would be
wrong there. Exponents over fan-in of what the columns name, with layer norm and dense fan-in initialisation after 200
steps, mean and range of three seeds."""
TRAINING = f"""A ResNet of three blocks, 4,000 made images of {skew.NUM_CLASSES} classes, 6 epochs, SGD with momentum, a
warm-up and a cosine to zero as ImageNet runs have, ERK shares."""
RATES_TEXT = """Each side has a sweep of its own at density 0.1, by factors of two until the best rate lies inside:
held-out accuracy at the end in percent, mean and range of three seeds."""
PAIRS = """Seeds that the sweep has not seen. A cell holds the held-out accuracy in percent of runs without the
correction, and what the correction adds in points: mean and 95% interval (Student's t) over seeds, paired. Of many
intervals one in twenty excludes zero by chance."""
FINDINGS = """Of 36 intervals one excludes zero (RigL at 0.05 after two epochs, corrected runs lower), as chance has
it. At the end corrected runs are between 1.7 points lower and 2.1 points higher, and no interval there excludes zero:
a gain as the paper's, 0.5 to 1.4 points, is neither seen nor excluded. The rates of 0.05 and 0.03 are those that were
tuned at 0.1. RigL without the correction is as good at a rate of 0.8 as at 0.4, so the different best rates of its
two sides mean little."""
UNTUNED = """Rate 0.1 for all, the sweep's seeds: the runs of an earlier version of this page. The sweep shows what such
a rate is worth: at four times as much all sides end more than 20 points higher at density 0.1."""
DENSE = """The dense baseline at its best rate, fresh seeds, and what holds it below 95%: mean and 95% interval, or one
run."""
DENSE_FINDINGS = """Images hold it below 95%, and not the labels, which the program that draws an image knows. Four
times the epochs end at 93.0% with a training loss of 0.004, so these images are known by heart; four times the images
reach 96.7% in as many steps. The study stays below 95% because it is small."""
