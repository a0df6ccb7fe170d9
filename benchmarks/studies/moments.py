"""Moments in bf16 and in 8 bits beside fp32."""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import tuned

NAME = "moments"
DENSITY = 0.25
MOMENTS = ("float32", "bfloat16", "int8")
WEIGHTS = (("float32", "1"), ("bfloat16", "1"), ("float32", "16"))  # dtype, block


def case(scale: Scale, dtype: str, block: str, moment_dtype: str, seed: int) -> Case:
    return tuned(scale.tiny, scale.tiny_steps, DENSITY, block, seed, dtype=dtype, moment_dtype=moment_dtype)


def cases(scale: Scale) -> list[Case]:
    return [
        case(scale, dtype, block, moment_dtype, seed)
        for seed in scale.seeds
        for dtype, block in WEIGHTS
        for moment_dtype in MOMENTS
    ]
