"""The three products of a linear layer with tiles in fp32, against dense torch."""

from __future__ import annotations

import statistics

import torch

from benchmarks.layer import DENSITY, PRODUCTS, Layers, Size, measure
from benchmarks.ratios import Clock, Pairs
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, at_least

TARGETS = {128: 0.8 / DENSITY, 64: 0.65 / DENSITY, 32: 0.4 / DENSITY}
SIZES = tuple(Size(t, c, r) for t in (2048, 4096) for c, r in ((768, 2048), (2048, 2048), (2048, 5461)))
QUICK_SIZES = (Size(96, 128, 512),)
NOTE = (
    f"Dense `x @ w.T`, `gy @ w`, `gy.T @ x` beside the ops that replace them, density {DENSITY}, {{dtype}}. GFLOP/s "
    "count useful operations: those of active blocks alone."
)


def tables(settings: Settings) -> list[Table]:
    clock = Clock(settings.device)
    sizes = settings.size(SIZES, QUICK_SIZES)
    rows = [_row(size, block, settings, clock) for block in TARGETS for size in sizes]
    return [Table("Linear layers of tiles", "dense / sparse", NOTE.format(dtype="fp32"), rows)]


def _row(size: Size, block: int, settings: Settings, clock: Clock) -> Row:
    layers = Layers(size, block, torch.float32, settings.device)
    found = measure(layers, PRODUCTS, settings, clock)
    together = Pairs.of_sum(found.values())
    more = {part: f"{statistics.median(pairs.speedups):.2f}" for part, pairs in found.items()}
    more |= rates(together, len(PRODUCTS) * size.flops, layers.site.density)
    return Row(f"{block} tiles, {size}", layers.kernels, together.speedups, at_least(TARGETS[block]), more)


def rates(pairs: Pairs, dense_flops: int, density: float) -> dict[str, str]:
    """GFLOP/s of both sides, of what each needs to compute."""
    dense, sparse = pairs.medians
    return {
        "dense GFLOP/s": f"{dense_flops / dense / 1e9:.0f}",
        "sparse GFLOP/s": f"{density * dense_flops / sparse / 1e9:.0f}",
    }
