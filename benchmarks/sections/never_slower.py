"""Measures products with single weights and runs beside dense ones, and products in bf16."""

from __future__ import annotations

import statistics

import torch

from benchmarks.layer import DENSITY, PRODUCTS, RUNS, SINGLE, UPDATE, Block, Measured, Size, measure, name_of
from benchmarks.ratios import Pairs
from benchmarks.sections.linear import NOTE, QUICK_SIZES, SIZES, rates
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, Target, at_most

FP32 = {
    0.5: {SINGLE: at_most(1.0)},
    DENSITY: {SINGLE: at_most(0.5), RUNS: at_most(0.4)},
    0.1: {SINGLE: at_most(0.25)},
    0.05: {SINGLE: at_most(0.15)},
}
BF16 = {128: at_most(1.1), 64: at_most(1.1), 32: at_most(1.1), SINGLE: at_most(1.5)}
_WITH_UPDATE = (
    " `with the update` adds the optimizer's step: `ActiveAdamW` beside fused `torch.optim.AdamW`, moments of the "
    "dtype of the weights; in bf16 the first rounds stochastically."
)


def single(settings: Settings) -> list[Table]:
    return [_table("Single weights and runs", torch.float32, FP32, settings)]


def bf16(settings: Settings) -> list[Table]:
    return [_table("bf16", torch.bfloat16, {DENSITY: BF16}, settings)]


def _table(title: str, dtype: torch.dtype, targets: dict[float, dict[Block, Target]], settings: Settings) -> Table:
    rows = [
        row
        for size in settings.size(SIZES, QUICK_SIZES)
        for density, by_block in targets.items()
        for row in _rows(size, density, dtype, by_block, settings)
    ]
    note = NOTE.format(dtype="fp32" if dtype == torch.float32 else "bf16", density=" and ".join(map(str, targets)))
    return Table(title, "sparse / dense", note + _WITH_UPDATE, rows)


def _rows(
    size: Size, density: float, dtype: torch.dtype, targets: dict[Block, Target], settings: Settings
) -> list[Row]:
    layers = measure(size, targets, dtype, settings, (*PRODUCTS, UPDATE), density)
    return [
        _row(f"{name_of(block)}, density {density}, {size}", size, target, layer)
        for (block, target), layer in zip(targets.items(), layers, strict=True)
    ]


def _row(what: str, size: Size, target: Target, layer: Measured) -> Row:
    more = {part: f"{statistics.median(layer.parts[part].costs):.2f}" for part in PRODUCTS}
    more["with the update"] = f"{statistics.median(Pairs.of_sum(layer.parts.values()).costs):.2f}"
    more["dense GFLOP/s"] = rates(layer.products, len(PRODUCTS) * size.flops, layer.density)["dense GFLOP/s"]
    return Row(what, layer.kernels, layer.products.costs, target, more)
