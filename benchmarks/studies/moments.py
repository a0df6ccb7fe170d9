"""Asks what moments in bf16 and in 8 bits cost beside those in fp32, in the same model at the rate of its width."""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import by_width

NAME = "moments"
DENSITY = 0.25
MOMENTS = ("float32", "bfloat16", "int8")
WEIGHTS = ("float32", "bfloat16")


def case(scale: Scale, dtype: str, moment_dtype: str, seed: int) -> Case:
    return by_width(scale.tiny, scale.tiny_steps, DENSITY, "1", seed, dtype=dtype, moment_dtype=moment_dtype)


def cases(scale: Scale) -> list[Case]:
    return [
        case(scale, dtype, moment_dtype, seed) for seed in scale.seeds for dtype in WEIGHTS for moment_dtype in MOMENTS
    ]
