"""Holds the rates that the learning-rate study found (docs/results/learning_rate.md) and all others use."""

from __future__ import annotations

from typing import Any

from benchmarks.studies.case import Case, Shape

PLAIN_RATE = 4e-3  # of embeddings, output embeddings and norms
RATE = 5e-4  # of the linear layers, dense; sparse ones get RATE / d^p
RATE_TIMES_WIDTH = 0.106  # peak rate of linear layers · d · width: fits all earlier sweeps whose best rate lay inside
EXPONENTS = {"1": 1.0, "1x16": 1.0, "16": 1.0, "32": 1.0, "64": 0.5}  # p, by block
_UPDATES, _EVERY = 20, 100


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
