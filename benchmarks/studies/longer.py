"""Asks how soon a wide sparse model reaches a loss, in processor time, beside dense models.

Three models of one depth train on the same batches of byte pairs, which are learnt from the text to train on: tiles of
64 at density 0.25, static, as the library keeps tiles by default; the dense model of that width; and a dense model with
as many bytes of training state as the sparse one. Their steps are made in turns in one process, and each is charged
the processor time of its own steps on one thread, held-out losses apart. The rate is constant after warm-up, so that
every point of a curve is the end of a shorter run. Each model's rate is the best of a sweep by factors of two around
.106 / (width · √d), in runs that are the beginning of the longer one. Dense models train with torch's fused AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.case import Case, Shape
from benchmarks.studies.race import add_race
from benchmarks.studies.records import Records
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import EXPONENTS, PLAIN_RATE
from benchmarks.studies.topology import rate_of

NAME = "longer"
RATES = "longer_rates.jsonl"
BLOCK, DENSITY = "64", 0.25
DENSE, SPARSE, EQUAL_BYTES = "dense", "tiles of 64, d 0.25", "dense, equal bytes"
MODELS = (DENSE, SPARSE, EQUAL_BYTES)
FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)  # of the rate, and further ones while the best is at an end
_MOST_FACTORS = 8
_WARMUP = 0.1


def _shape(scale: Scale, model: str) -> Shape:
    return scale.race.equal_bytes if model == EQUAL_BYTES else scale.race.wide


def case(scale: Scale, model: str, factor: float) -> Case:
    """Returns the longer run of a model at a factor of its rate."""
    return _case(scale, model, factor, scale.race.steps)


def rate_case(scale: Scale, model: str, factor: float) -> Case:
    """Returns the beginning of the longer run."""
    return _case(scale, model, factor, scale.race.rate_steps)


def _case(scale: Scale, model: str, factor: float, steps: int) -> Case:
    shape = _shape(scale, model)
    sparse: dict[str, Any] = {"density": DENSITY, "block": BLOCK, "exponent": EXPONENTS[BLOCK]}
    return Case(
        shape=shape, steps=steps, rate=factor * rate_of(shape), plain_rate=PLAIN_RATE, decay="constant",
        warmup=min(1.0, _WARMUP * scale.race.steps / steps), every=0,
        vocabulary=scale.race.vocabulary, text=scale.race.text,
        **(sparse if model == SPARSE else {}),
    )  # fmt: skip


def losses(rates: Records, scale: Scale, model: str) -> dict[float, float]:
    """Returns the losses of the sweep by factor, in rising order; a run that diverged counts as infinite."""
    factors = (2.0**power for power in range(-_MOST_FACTORS, _MOST_FACTORS + 1))
    found = {factor: rate_case(scale, model, factor).key for factor in factors}
    known = {factor: rates[key]["loss"] for factor, key in found.items() if key in rates}
    return {factor: float("inf") if loss is None else loss for factor, loss in known.items()}


def best_factor(rates: Records, scale: Scale, model: str) -> float:
    """Returns the factor with the lowest loss so far, 1 before any run."""
    found = losses(rates, scale, model)
    return min(found, key=lambda factor: found[factor]) if found else 1.0


def missing_factors(rates: Records, scale: Scale, model: str) -> list[float]:
    """Returns the factors to try next: those of the start, then one beyond the end where the best one is."""
    found = losses(rates, scale, model)
    missing = [factor for factor in FACTORS if factor not in found]
    if missing or len(found) >= _MOST_FACTORS:
        return missing
    best = best_factor(rates, scale, model)
    return [best / 2] * (best == min(found)) + [best * 2] * (best == max(found))


def prepare(scale: Scale, folder: Path) -> None:
    """Chooses the rates: trains what the sweeps lack."""
    rates = Records(folder / RATES)
    for model in MODELS:
        while missing := missing_factors(rates, scale, model):
            add_race([rate_case(scale, model, factor) for factor in missing], rates, 1, scale.eager)


def cases(scale: Scale, folder: Path) -> Sequence[Case]:
    """Returns the longer runs, each at its best rate."""
    rates = Records(folder / RATES)
    return [case(scale, model, best_factor(rates, scale, model)) for model in MODELS]
