"""Asks what a density, a block shape, a distribution and a way to grow cost in loss at the same tokens."""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import RATE_FACTORS, by_width, tuned

NAME = "quality"
DENSITIES = (0.25, 0.1, 0.5)
BLOCKS = ("1", "64", "16", "1x16", "32")
TILES = ("16", "32", "64")
VARIED = 0.25  # where one other factor is changed at a time
ONE_SEED = ((0.5, "1x16"), (0.1, "1x16"))
DENSE = (1.0, "1")
LONG = ((0.25, "1"), (0.1, "1"), (0.5, "1"), (0.25, "16"), (0.5, "16"))
AT_RATES = (DENSE, (0.25, "1"))  # the long runs whose rate is tried lower and higher
VARIANTS: dict[str, dict] = {
    "ERK": {"distribution": "erk"},
    "gradient growth": {"grow": "gradient"},
    "static": {"every": 0},
}


def dense_case(scale: Scale, seed: int) -> Case:
    return tuned(scale.large, scale.quality_steps, 1.0, "1", seed)


def sparse_case(scale: Scale, density: float, block: str, seed: int, **options) -> Case:
    return tuned(scale.large, scale.quality_steps, density, block, seed, **options)


def long_case(scale: Scale, density: float, block: str, seed: int, rate_factor: float = 1.0) -> Case:
    """Returns a run so long, of a model so small, that the number of weights counts; dense at density 1."""
    return by_width(scale.tiny, scale.long_steps, density, block, seed, rate_factor)


def cases(scale: Scale) -> list[Case]:
    """Returns all runs, first those on which conclusions rest."""
    first = scale.seeds[0]
    kinds = [(density, block) for block in BLOCKS for density in DENSITIES]
    found = []
    for seed in scale.seeds:
        found += [dense_case(scale, seed)]
        found += [sparse_case(scale, *kind, seed) for kind in kinds if seed == first or kind not in ONE_SEED]
        found += [long_case(scale, *kind, seed) for kind in (DENSE, *LONG)]
        found += [sparse_case(scale, VARIED, block, seed, even=False) for block in TILES]
    found += [sparse_case(scale, VARIED, "1", first, **options) for options in VARIANTS.values()]
    return found + [long_case(scale, *kind, first, factor) for kind in AT_RATES for factor in RATE_FACTORS]
