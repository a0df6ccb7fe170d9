"""Holds the rates of the studies: those that the learning-rate study found, and a rule by width of later ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.studies.case import Case, Shape

PLAIN_RATE = 4e-3  # of embeddings, output embeddings and norms
RATE = 5e-4  # of the linear layers, dense; sparse ones get RATE / d^p
RATE_TIMES_WIDTH = 0.106  # peak rate of linear layers · d · width: fits all earlier sweeps whose best rate lay inside
EXPONENTS = {"1": 1.0, "1x16": 1.0, "16": 1.0, "32": 1.0, "64": 0.5}  # p, by block
RATE_FACTORS = (1 / 1.5, 1.5)  # lower and higher, where a study asks whether the rate was right
_UPDATES, _EVERY = 20, 100
_MANY = 1 / 3  # a larger share leaves too little to drop if newcomers stay for two updates
_TILES = ("16", "32", "64")


def rate_of(shape: Shape) -> float:
    """Returns the peak rate of the linear layers before it is divided by the density."""
    return RATE_TIMES_WIDTH / shape.hidden


def tuned(shape: Shape, steps: int, density: float, block: str, seed: int, **options: Any) -> Case:
    """Returns a run with the rates above and defaults otherwise, except that short runs update more often.

    Dense at density 1. ``options`` are further fields of the case.
    """
    every = max(1, min(_EVERY, steps // _UPDATES))
    plain: dict[str, Any] = {"rate": RATE, "plain_rate": PLAIN_RATE, "seed": seed}
    if density < 1:
        plain |= {"density": density, "block": block, "exponent": EXPONENTS[block]}
        plain |= {"every": every, "block_warmup": every}
    return Case(shape=shape, steps=steps, **(plain | options))


def by_width(
    shape: Shape, steps: int, density: float, block: str, seed: int, rate_factor: float = 1.0, **options: Any
) -> Case:
    """Returns a run at the rate by width, with the library's defaults: newcomers are protected, and tiles stay.

    Dense at density 1. ``options`` are further fields of the case; newcomers are protected by the ones given.
    """
    plain: dict[str, Any] = {"rate": rate_factor * rate_of(shape)}
    if density < 1:
        plain |= {"exponent": 1.0} | ({"every": 0} if block in _TILES else {})
    run = tuned(shape, steps, density, block, seed, **(plain | options))
    if density == 1 or "min_age" in options:
        return run
    return replace(run, min_age=run.every if run.drop_fraction > _MANY else 2 * run.every)
