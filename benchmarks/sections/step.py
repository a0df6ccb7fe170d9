"""Measures a training step of a small LLaMA against dense ``torch.compile`` with torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from benchmarks.layer import DENSITY
from benchmarks.ratios import Clock, Pairs, in_turns
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, Target, at_least
from benchmarks.training import BYTES, DENSE, FUSED, TWO_CALLS, Recipe, Shape, Training, static_shapes, training

BLOCK = 64
WARMUP = 2
TARGET = at_least(1.8)
SHAPE = Shape(hidden=768, intermediate=2048, heads=12, layers=4, vocabulary=BYTES, sequence=256, batch=8)
QUICK_SHAPE = Shape(hidden=256, intermediate=256, heads=4, layers=1, vocabulary=BYTES, sequence=16, batch=2)
LARGER_VOCABULARY = 32000
NOTE = (
    "A LLaMA of {layers} layers, hidden {hidden}, intermediate {intermediate}, {batch} sequences of {sequence} tokens, "
    'fp32, {block} tiles, density 0.25: forward, backward and optimizer step. "bound" counts operations alone, dense / '
    "sparse: weights, head and causal attention."
)


def tables(settings: Settings) -> list[Table]:
    shape = settings.size(SHAPE, QUICK_SHAPE)
    rows = measure(shape, torch.float32, {(FUSED, BLOCK): TARGET, (TWO_CALLS, BLOCK): None}, settings)
    if not settings.quick:
        rows += measure(replace(shape, vocabulary=LARGER_VOCABULARY), torch.float32, {(FUSED, BLOCK): None}, settings)
    return [Table("Training step", "dense / sparse", NOTE.format(block=BLOCK, **vars(shape)), rows)]


def measure(
    shape: Shape, dtype: torch.dtype, variants: Mapping[tuple[str, int], Target | None], settings: Settings
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
    what = f"{run.recipe.method}, {run.recipe.block} tiles, vocabulary {shape.vocabulary}"
    return Row(what, run.kernels, pairs.speedups, target, more)
