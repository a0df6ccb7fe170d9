"""A whole training step of a small LLaMA, against dense ``torch.compile`` with torch's fused AdamW."""

from __future__ import annotations

import torch

from benchmarks.ratios import Clock, in_turns
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, Target, at_least
from benchmarks.training import BYTES, DENSE, FUSED, TWO_CALLS, Recipe, Shape, static_shapes, training

BLOCK = 64
WARMUP = 2
TARGET = at_least(1.8)
SHAPE = Shape(hidden=768, intermediate=2048, heads=12, layers=4, vocabulary=BYTES, sequence=256, batch=8)
QUICK_SHAPE = Shape(hidden=256, intermediate=256, heads=4, layers=1, vocabulary=BYTES, sequence=16, batch=2)
LARGER_VOCABULARY, QUICK_LARGER_VOCABULARY = 32000, 512
NOTE = (
    "A LLaMA of {layers} layers, hidden {hidden}, intermediate {intermediate}, {batch} sequences of {sequence} tokens, "
    'fp32, {block} tiles, density 0.25: forward, backward and optimizer step. "bound" counts operations alone, dense / '
    "sparse: weights, head and causal attention."
)


def tables(settings: Settings) -> list[Table]:
    shape = settings.size(SHAPE, QUICK_SHAPE)
    larger = Shape(**vars(shape) | {"vocabulary": settings.size(LARGER_VOCABULARY, QUICK_LARGER_VOCABULARY)})
    rows = [
        row(FUSED, shape, BLOCK, torch.float32, TARGET, settings),
        row(TWO_CALLS, shape, BLOCK, torch.float32, None, settings),
    ]
    if not settings.quick:
        rows.append(row(FUSED, larger, BLOCK, torch.float32, None, settings))
    return [Table("Training step", "dense / sparse", NOTE.format(block=BLOCK, **vars(shape)), rows)]


def row(method: str, shape: Shape, block: int, dtype: torch.dtype, target: Target | None, settings: Settings) -> Row:
    """``method`` and dense training in turns."""
    with static_shapes():
        dense, sparse = (training(Recipe(m, shape, block, dtype, settings.device)) for m in (DENSE, method))
        pairs = in_turns(dense.step, sparse.step, settings.repeats, Clock(settings.device), WARMUP)
    seconds = dict(zip(("dense, s", "sparse, s"), (f"{median:.4g}" for median in pairs.medians), strict=True))
    what = f"{method}, {block} tiles, vocabulary {shape.vocabulary}"
    return Row(what, sparse.kernels, pairs.speedups, target, {"bound": f"{shape.bound:.2f}"} | seconds)
