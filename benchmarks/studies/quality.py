"""What a density, a block shape, a distribution and a way to grow cost in quality: held-out loss at the same tokens."""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import EXPONENTS, PLAIN_RATE, RATE

NAME = "quality"
DENSITIES = (0.25, 0.1, 0.5)
BLOCKS = ("1", "64", "16", "1x16", "32")
TILES = ("16", "32", "64")
IN_ALL_SEEDS = ("1", "64")
VARIANTS: dict[str, dict] = {
    "ERK": {"distribution": "erk"},
    "gradient growth": {"grow": "gradient"},
    "static": {"every": 0},
}


def dense_case(scale: Scale, seed: int) -> Case:
    return Case(shape=scale.large, steps=scale.quality_steps, rate=RATE, plain_rate=PLAIN_RATE, seed=seed)


def sparse_case(scale: Scale, density: float, block: str, seed: int, **options) -> Case:
    return Case(
        shape=scale.large,
        steps=scale.quality_steps,
        rate=RATE,
        plain_rate=PLAIN_RATE,
        exponent=EXPONENTS[block],
        density=density,
        block=block,
        seed=seed,
        **options,
    )


def long_case(scale: Scale, density: float) -> Case:
    """A run in which the number of weights counts, with single weights; dense at density 1."""
    return Case(
        shape=scale.long,
        steps=scale.long_steps,
        rate=RATE,
        plain_rate=PLAIN_RATE,
        exponent=EXPONENTS["1"],
        density=density,
    )


def cases(scale: Scale) -> list[Case]:
    """First what conclusions rest on."""
    first = scale.seeds[0]
    found = [dense_case(scale, first)]
    found += [sparse_case(scale, density, block, first) for block in BLOCKS for density in DENSITIES]
    found += [long_case(scale, density) for density in (1.0, *DENSITIES)]
    for seed in scale.seeds[1:]:
        found += [dense_case(scale, seed)]
        found += [sparse_case(scale, density, block, seed) for block in IN_ALL_SEEDS for density in DENSITIES]
    found += [sparse_case(scale, d, "1", first, **options) for options in VARIANTS.values() for d in DENSITIES]
    found += [sparse_case(scale, d, block, first, even=False) for block in TILES for d in DENSITIES]
    return found
