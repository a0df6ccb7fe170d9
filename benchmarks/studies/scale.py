"""Defines how large the studies are: for two cores and some hours, for a GPU, and for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.studies.case import Shape


@dataclass(frozen=True)
class Scale:
    """Holds shapes and lengths.

    Args:
        small: for spikes. large: wide enough for tiles of 64.
        tiny: so few weights that ``long_steps`` read ten bytes or more for each: there the number of weights counts.
        *_steps: lengths of the runs; ``tiny_steps`` of those that change one setting.
        replicas: of the models that train side by side, so small that many runs of 20 bytes for each weight are cheap.
        memory: of `equal_memory`, whose width each contestant sets. memory_steps: its lengths, shorter ones first.
        budgets, widest: widths of the dense models that set the budgets there, and the largest it tries.
        eager: without compiler.
    """

    small: Shape
    large: Shape
    tiny: Shape
    rate_steps: int
    spike_steps: int
    tiny_steps: int
    quality_steps: int
    long_steps: int
    memory: Shape
    memory_steps: tuple[int, ...]
    budgets: tuple[int, ...]
    widest: int
    replicas: Shape
    seeds: tuple[int, ...] = (0, 1, 2)
    eager: bool = False


_SMALL = Shape(hidden=128, intermediate=352, heads=4, layers=6, sequence=64, batch=8)
_LARGE = Shape(hidden=256, intermediate=640, heads=4, layers=3, sequence=64, batch=8)
_GPU = Shape(hidden=512, intermediate=1376, heads=8, layers=8, sequence=256, batch=64, device="cuda")
_QUICK = Shape(hidden=32, intermediate=64, heads=2, layers=1, sequence=16, batch=2)

SCALES = {
    "cpu": Scale(
        small=_SMALL,
        large=_LARGE,
        tiny=replace(_SMALL, hidden=64, intermediate=160, layers=4),
        rate_steps=500,
        spike_steps=1200,
        tiny_steps=2000,
        quality_steps=1000,
        long_steps=5000,
        memory=replace(_LARGE, sequence=256, batch=2),
        memory_steps=(4000, 16_000),
        budgets=(64, 112, 192),
        widest=1024,
        replicas=replace(_SMALL, hidden=48, intermediate=96, heads=3, layers=2),
    ),
    "gpu": Scale(
        small=replace(_GPU, hidden=256, intermediate=688, heads=4, layers=4),
        large=_GPU,
        tiny=replace(_GPU, hidden=256, intermediate=688, heads=4, layers=4),
        rate_steps=2000,
        spike_steps=4000,
        tiny_steps=4000,
        quality_steps=10_000,
        long_steps=40_000,
        memory=_GPU,
        memory_steps=(10_000, 40_000),
        budgets=(256, 512),
        widest=4096,
        replicas=replace(_GPU, hidden=192, intermediate=384, heads=6, layers=4),
    ),
    "quick": Scale(
        small=_QUICK,
        large=replace(_QUICK, hidden=256, intermediate=256),
        tiny=_QUICK,
        rate_steps=4,
        spike_steps=40,
        tiny_steps=8,
        quality_steps=4,
        long_steps=6,
        memory=replace(_QUICK, hidden=64, intermediate=160),
        memory_steps=(4, 8),
        budgets=(64,),
        widest=256,
        replicas=replace(_QUICK, hidden=24, intermediate=48, heads=3),
        seeds=(0, 1),
        eager=True,
    ),
}
