"""Measures the three products of a linear layer with tiles in fp32 against dense torch."""

from __future__ import annotations

import statistics

import torch

from benchmarks.layer import DENSITY, PRODUCTS, Measured, Size, measure
from benchmarks.ratios import Pairs
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, Target, at_least

TARGETS = {128: 0.8 / DENSITY, 64: 0.65 / DENSITY, 32: 0.4 / DENSITY}
SIZES = tuple(Size(t, c, r) for t in (2048, 4096) for c, r in ((768, 2048), (2048, 2048), (2048, 5461)))
QUICK_SIZES = (Size(96, 128, 512),)
NOTE = (
    "Dense `x @ w.T`, `gy @ w`, `gy.T @ x` beside the ops that replace them, density {density}, {dtype}. GFLOP/s "
    "count useful operations: those of active blocks alone. Where dense / sparse exceeds 1/d, the dense library "
    "is the slower one per operation."
)


def tables(settings: Settings) -> list[Table]:
    rows = [row for size in settings.size(SIZES, QUICK_SIZES) for row in _rows(size, settings)]
    return [Table("Linear layers of tiles", "dense / sparse", NOTE.format(dtype="fp32", density=DENSITY), rows)]


def _rows(size: Size, settings: Settings) -> list[Row]:
    found = zip(TARGETS.items(), measure(size, TARGETS, torch.float32, settings), strict=True)
    return [_row(f"{block} tiles, {size}", size, at_least(target), layer) for (block, target), layer in found]


def _row(what: str, size: Size, target: Target, layer: Measured) -> Row:
    more = {part: f"{statistics.median(pairs.speedups):.2f}" for part, pairs in layer.parts.items()}
    more |= rates(layer.products, len(PRODUCTS) * size.flops, layer.density)
    return Row(what, layer.kernels, layer.products.speedups, target, more)


def rates(pairs: Pairs, dense_flops: int, density: float) -> dict[str, str]:
    """Returns GFLOP/s of both sides, counting the operations that each needs."""
    dense, sparse = pairs.medians
    return {
        "dense GFLOP/s": f"{dense_flops / dense / 1e9:.0f}",
        "sparse GFLOP/s": f"{density * dense_flops / sparse / 1e9:.0f}",
    }
