"""Asks which power of the density the learning rate should follow: p of α d^(-p).

Dense, and d = .5, .25, .1 with single weights and tiles of 64, each at p = 0, .5, 1 and at the same five base rates α.
What counts for a user is one base rate, tuned once on the dense model or at one density, that then holds at others: the
best p is the one whose losses lie nearest, at one α, to the best found at each density.

Embeddings, output embeddings and norms have no density, and a first look found that they want a rate ten times that
of the linear layers: with one rate for all, what is learnt is mostly about them (dense loses 0.11 nats per byte by it,
and a tenth of its weights trains better than all of them). So they have a rate of their own, the same in all runs; the
runs with one rate for all, fewer of them, stand in a second part.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import PLAIN_RATE

NAME = "learning_rate"
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
EXPONENTS = (0.0, 0.5, 1.0)
DENSITIES = (0.5, 0.25, 0.1)
BLOCKS = ("1", "64")
TUNED = tuple((density, block) for density in (0.25, 0.1, 0.5) for block in BLOCKS)
ONE_RATE = ((0.25, "1"), (0.25, "64"), (0.1, "1"))  # in the second part
OTHER_BLOCKS, OTHER_DENSITIES, OTHER_RATE, OTHER_EXPONENTS = ("1x16", "16", "32"), (0.25, 0.1), 5e-4, (0.5, 1.0)
_EXACT = (0.5, 0.25)  # of every weight, by count: there α d^(-p) is all that counts, and some runs are the same
_UPDATES = 16


def dense_case(scale: Scale, rate: float, plain_rate: float | None = PLAIN_RATE, seed: int = 0) -> Case:
    return Case(shape=scale.large, steps=scale.rate_steps, rate=rate, plain_rate=plain_rate, seed=seed)


def sparse_case(
    scale: Scale, rate: float, exponent: float, density: float, block: str, plain_rate: float | None = PLAIN_RATE
) -> Case:
    every = max(1, scale.rate_steps // _UPDATES)
    if density in _EXACT and plain_rate is not None:
        rate, exponent = rate / density**exponent, 0.0
    return Case(
        shape=scale.large, steps=scale.rate_steps, rate=rate, plain_rate=plain_rate, exponent=exponent,
        density=density, block=block, every=every, block_warmup=every,
    )  # fmt: skip


def cases(scale: Scale) -> list[Case]:
    found = []
    for plain_rate, kinds in ((PLAIN_RATE, TUNED), (None, ONE_RATE)):
        found += [dense_case(scale, rate, plain_rate) for rate in RATES]
        found += [
            sparse_case(scale, rate, exponent, density, block, plain_rate)
            for density, block in kinds
            for rate in (5e-4, 1e-3, 2e-3, 2.5e-4, 4e-3)
            for exponent in reversed(EXPONENTS)
        ]
    found += [
        sparse_case(scale, OTHER_RATE, exponent, density, block)
        for block in OTHER_BLOCKS
        for density in OTHER_DENSITIES
        for exponent in OTHER_EXPONENTS
    ]
    return found + [replace(case, seed=seed) for seed in scale.seeds[1:] for case in again(scale)]


def again(scale: Scale) -> list[Case]:
    """Returns the runs on which the choice of p rests, for more seeds."""
    sparse = [
        sparse_case(scale, OTHER_RATE, exponent, density, block)
        for density, block in ONE_RATE
        for exponent in OTHER_EXPONENTS
    ]
    return [dense_case(scale, OTHER_RATE), *sparse]
