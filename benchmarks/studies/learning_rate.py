"""Which power of the density the learning rate should follow: p of α d^(-p).

Dense, and d = .5, .25, .1 with single weights and tiles of 64, each at p = 0, .5, 1 and at the same five base rates.
What counts for a user is one base rate, tuned once on the dense model or at one density, that then holds at others:
the best p is the one whose losses at the dense model's best rate lie nearest to the best found at that density.
"""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale

NAME = "learning_rate"
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
EXPONENTS = (0.0, 0.5, 1.0)
DENSITIES = (0.5, 0.25, 0.1)
BLOCKS = ("1", "64")
_UPDATES = 16


def dense_case(scale: Scale, rate: float, seed: int = 0) -> Case:
    return Case(shape=scale.large, steps=scale.rate_steps, rate=rate, seed=seed)


def sparse_case(scale: Scale, rate: float, exponent: float, density: float, block: str, seed: int = 0) -> Case:
    every = max(1, scale.rate_steps // _UPDATES)
    return Case(
        shape=scale.large, steps=scale.rate_steps, rate=rate, exponent=exponent, density=density, block=block,
        every=every, block_warmup=every, seed=seed,
    )  # fmt: skip


def cases(scale: Scale) -> list[Case]:
    dense = [dense_case(scale, rate) for rate in RATES]
    sparse = [
        sparse_case(scale, rate, exponent, density, block)
        for density in (0.25, 0.1, 0.5)
        for block in reversed(BLOCKS)
        for rate in (5e-4, 1e-3, 2.5e-4, 2e-3, 4e-3)
        for exponent in EXPONENTS
    ]
    return dense + sparse
