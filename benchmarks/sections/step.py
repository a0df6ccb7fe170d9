"""Measures a training step of a small LLaMA against dense ``torch.compile`` with torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from benchmarks.layer import DENSITY, SINGLE, Block, name_of
from benchmarks.ratios import Clock, Pairs, in_turns
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, Target, at_least
from benchmarks.training import BYTES, DENSE, FUSED, TWO_CALLS, Recipe, Shape, Training, static_shapes, training

BLOCK = 64
WARMUP = 2
TARGET, SINGLE_TARGET, DEMO_TARGET = at_least(1.8), at_least(1.5), at_least(1 / 0.9)
SHAPE = Shape(hidden=768, intermediate=2048, heads=12, layers=4, vocabulary=BYTES, sequence=256, batch=8)
QUICK_SHAPE = Shape(hidden=256, intermediate=256, heads=4, layers=1, vocabulary=BYTES, sequence=16, batch=2)
DEMO = Shape(hidden=128, intermediate=352, heads=4, layers=6, vocabulary=BYTES, sequence=128, batch=16)
LARGER_VOCABULARY = 32000
NOTE = (
    "A LLaMA of {layers} layers, hidden {hidden}, intermediate {intermediate}, {batch} sequences of {sequence} tokens, "
    'fp32, density 0.25: forward, backward and optimizer step. "bound" counts operations alone, dense / '
    "sparse: weights, head and causal attention."
)


def tables(settings: Settings) -> list[Table]:
    shape = settings.size(SHAPE, QUICK_SHAPE)
    variants = {(FUSED, BLOCK): TARGET, (TWO_CALLS, BLOCK): None, (FUSED, SINGLE): SINGLE_TARGET}
    rows = measure(shape, torch.float32, variants, settings)
    if not settings.quick:
        rows += measure(replace(shape, vocabulary=LARGER_VOCABULARY), torch.float32, {(FUSED, BLOCK): None}, settings)
        rows += measure(DEMO, torch.float32, {(FUSED, SINGLE): DEMO_TARGET}, settings)
    return [Table("Training step", "dense / sparse", NOTE.format(**vars(shape)), rows)]


def measure(
    shape: Shape, dtype: torch.dtype, variants: Mapping[tuple[str, Block], Target | None], settings: Settings
) -> list[Row]:
    """Measures sparse training by each method and side of a tile, in turns with dense training."""
    with static_shapes():
        dense = training(Recipe(DENSE, shape, 0, dtype, settings.device))
        sparse = [training(Recipe(method, shape, block, dtype, settings.device)) for method, block in variants]
        steps = [run.step for run in sparse]
        found = in_turns(dense.step, steps, settings.repeats, Clock(settings.device), WARMUP)
    return [_row(run, pairs, target) for run, pairs, target in zip(sparse, found, variants.values(), strict=True)]


def _row(run: Training, pairs: Pairs, target: Target | None) -> Row:
    shape, (dense, sparse) = run.recipe.shape, pairs.medians
    more = {
        "bound": f"{shape.bound:.2f}",
        "dense, s": f"{dense:.4g}",
        "sparse, s": f"{sparse:.4g}",
        "dense GFLOP/s": f"{shape.flops(1) / dense / 1e9:.0f}",
        "sparse GFLOP/s": f"{shape.flops(DENSITY) / sparse / 1e9:.0f}",
    }
    what = f"{run.recipe.method}, {name_of(run.recipe.block)}, hidden {shape.hidden}, vocabulary {shape.vocabulary}"
    return Row(what, run.kernels, pairs.speedups, target, more)
