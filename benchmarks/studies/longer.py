"""Asks how soon a wide sparse model reaches a loss, in processor time, beside dense models.

Models of one depth train on the same batches of byte pairs, which are learnt from the text to train on: tiles of 64 at
density 0.25, static, as the library keeps tiles by default, in order or permuted in each layer; the dense model of that
width; and a dense model with as many bytes of training state as the sparse one. Their steps are made in turns in one
process, and each is charged the processor time of its own steps on one thread, held-out losses apart. The rate is
constant after warm-up, so that every point of a curve is the end of a shorter run. Peak rates are factors of .106 /
(width · √d) for linear layers, tried by twos over the whole length in the first seed until a lower and a higher one are
worse: the first steps want a higher rate than the whole run. Dense models train with torch's fused AdamW.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.studies import rates
from benchmarks.studies.case import Case, Shape
from benchmarks.studies.rates import Search
from benchmarks.studies.records import Records
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import EXPONENTS, PLAIN_RATE, rate_of

NAME = "longer"
BLOCK, DENSITY = "64", 0.25
DENSE, EQUAL_BYTES = "dense", "dense, equal bytes"
SPARSE, PERMUTED = "tiles of 64, d 0.25", "tiles of 64, d 0.25, permuted"
MODELS = (DENSE, SPARSE, PERMUTED, EQUAL_BYTES)
FACTORS = (2.0, 4.0, 8.0)  # of the rate, and further ones while the best is at an end


def shape_of(scale: Scale, model: str) -> Shape:
    return scale.race.equal_bytes if model == EQUAL_BYTES else scale.race.wide


def case(scale: Scale, model: str, factor: float, seed: int = 0) -> Case:
    """Returns the run of a model at a factor of its rate."""
    shape, sparse = shape_of(scale, model), model in (SPARSE, PERMUTED)
    options: dict[str, Any] = {"density": DENSITY, "block": BLOCK, "exponent": EXPONENTS[BLOCK]} if sparse else {}
    return Case(
        shape=shape, steps=scale.race.steps, rate=factor * rate_of(shape), plain_rate=PLAIN_RATE, decay="constant",
        every=0, permuted=model == PERMUTED, seed=seed, vocabulary=scale.race.vocabulary, text=scale.race.text,
        **options,
    )  # fmt: skip


def search(scale: Scale, model: str, records: Records) -> Search:
    """Looks for the best factor of a model's rate."""
    return rates.search(lambda factor: case(scale, model, factor, scale.seeds[0]), records, FACTORS)


def cases(scale: Scale, folder: Path) -> list[Case]:
    """Returns the runs that can be named by now, one factor after another, then the seeds of the best ones.

    Runs of one factor or seed follow each other, so that they train in turns.
    """
    records = Records(folder / f"{NAME}.jsonl")
    searches = {model: search(scale, model, records) for model in MODELS}
    by_rank = [each.cases for each in searches.values()]
    found = [cases[rank] for rank in range(max(map(len, by_rank))) for cases in by_rank if rank < len(cases)]
    if all(each.best is not None for each in searches.values()):
        found += [
            case(scale, model, each.best or 1.0, seed) for seed in scale.seeds for model, each in searches.items()
        ]
    return list(dict.fromkeys(found))
