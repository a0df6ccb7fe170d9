"""Defines how large the studies are: for two cores and some hours, for a GPU, and for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.studies.case import Shape
from benchmarks.studies.corpus import STDLIB


@dataclass(frozen=True)
class Race:
    """Describes models that train in turns.

    Args:
        wide: the shape of the sparse model and of the dense one of its width.
        equal_bytes: of a dense model with as many bytes of training state as the sparse one.
        vocabulary: number of byte pairs. steps: of each.
        text: what `Corpus` reads.
    """

    wide: Shape
    equal_bytes: Shape
    vocabulary: int
    steps: int
    text: str = STDLIB


@dataclass(frozen=True)
class Scale:
    """Holds shapes and lengths.

    Args:
        small: for spikes. large: wide enough for tiles of 64.
        tiny: so few weights that ``long_steps`` read ten bytes or more for each: there the number of weights counts.
        *_steps: lengths of the runs; ``tiny_steps`` of those that change one setting.
        replicas: of the models that train side by side, so small that many runs of 20 bytes for each weight are cheap.
        sizes: shapes of three sizes, and the steps of each.
        race: of the longer run.
        memory: of `equal_memory`, whose width each contestant sets. memory_steps: its lengths, shorter ones first.
        timed: of `equal_time`, so narrow that the steps read bytes enough for each weight; and the dense model's steps.
        budgets, widest: widths of the dense models that set the budgets there, and the largest it tries.
        seeds: of most studies. many_seeds: of what conclusions about spikes and equal memory rest on.
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
    timed: tuple[Shape, int]
    budgets: tuple[int, ...]
    widest: int
    replicas: Shape
    sizes: tuple[tuple[Shape, int], ...]
    race: Race
    seeds: tuple[int, ...] = (0, 1, 2)
    many_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    eager: bool = False


_SMALL = Shape(hidden=128, intermediate=352, heads=4, layers=6, sequence=64, batch=8)
_LARGE = Shape(hidden=256, intermediate=640, heads=4, layers=3, sequence=64, batch=8)
_CONTEXT = replace(_SMALL, sequence=128, batch=4)
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
        timed=(replace(_LARGE, hidden=160, intermediate=400, sequence=256, batch=4), 3000),
        budgets=(64, 112),
        widest=1024,
        replicas=replace(_SMALL, hidden=48, intermediate=96, heads=3, layers=2),
        sizes=(
            (replace(_CONTEXT, hidden=64, intermediate=160, heads=4, layers=4), 1500),
            (replace(_CONTEXT, hidden=160, intermediate=400, heads=5, layers=5), 800),
            (replace(_CONTEXT, hidden=288, intermediate=720, heads=9, layers=5), 400),
        ),
        race=Race(
            wide=replace(_CONTEXT, hidden=1024, intermediate=2688, heads=16, layers=2),
            equal_bytes=replace(_CONTEXT, hidden=544, intermediate=1424, heads=8, layers=2),
            vocabulary=1024,
            steps=600,
        ),
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
        timed=(replace(_GPU, hidden=1024, intermediate=2752, heads=16), 10_000),
        budgets=(256, 512),
        widest=4096,
        replicas=replace(_GPU, hidden=192, intermediate=384, heads=6, layers=4),
        sizes=(
            (replace(_GPU, hidden=256, intermediate=688, heads=4, layers=4), 4000),
            (replace(_GPU, hidden=512, intermediate=1376, heads=8, layers=8), 4000),
            (replace(_GPU, hidden=1024, intermediate=2752, heads=16, layers=12), 4000),
        ),
        race=Race(
            wide=replace(_GPU, hidden=2048, intermediate=5504, heads=16, layers=8),
            equal_bytes=replace(_GPU, hidden=1024, intermediate=2752, heads=16, layers=8),
            vocabulary=8192,
            steps=4000,
        ),
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
        timed=(replace(_QUICK, hidden=64, intermediate=128), 8),
        budgets=(64,),
        widest=256,
        replicas=replace(_QUICK, hidden=24, intermediate=48, heads=3),
        sizes=((_QUICK, 4), (replace(_QUICK, hidden=64), 4), (replace(_QUICK, hidden=96), 4)),
        race=Race(
            wide=replace(_QUICK, hidden=128, intermediate=256),
            equal_bytes=replace(_QUICK, hidden=64, intermediate=128),
            vocabulary=300,
            steps=8,
            text=str(Path(__file__).parent),
        ),
        seeds=(0, 1),
        many_seeds=(0, 1),
        eager=True,
    ),
}
