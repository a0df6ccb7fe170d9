"""What a density, a block shape, a distribution and a way to grow cost in quality: held-out loss at the same tokens."""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import BASE_RATE, DENSE_RATE, EXPONENT

NAME = "quality"
DENSITIES = (0.25, 0.1, 0.5)
BLOCKS = ("1", "64", "16", "1x16", "32")
VARIANTS: dict[str, dict] = {"ERK": {"distribution": "erk"}, "gradient growth": {"grow": "gradient"}}


def dense_case(scale: Scale, seed: int) -> Case:
    return Case(shape=scale.large, steps=scale.quality_steps, rate=DENSE_RATE, seed=seed)


def sparse_case(scale: Scale, density: float, block: str, seed: int, **options) -> Case:
    return Case(
        shape=scale.large, steps=scale.quality_steps, rate=BASE_RATE, exponent=EXPONENT, density=density, block=block,
        seed=seed, **options,
    )  # fmt: skip


def cases(scale: Scale) -> list[Case]:
    """Seed by seed: first what conclusions rest on."""
    found = []
    for seed in scale.seeds:
        found += [dense_case(scale, seed)]
        found += [sparse_case(scale, density, block, seed) for block in BLOCKS for density in DENSITIES]
        if seed == scale.seeds[0]:
            found += [sparse_case(scale, d, "1", seed, **options) for options in VARIANTS.values() for d in DENSITIES]
            found += [sparse_case(scale, 0.25, "16", seed, **options) for options in VARIANTS.values()]
            found += [sparse_case(scale, d, "1", seed, every=0) for d in DENSITIES]
    return found
