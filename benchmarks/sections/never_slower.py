"""Measures that sparse products take hardly longer than dense ones where there is nothing to skip."""

from __future__ import annotations

import statistics

import torch

from benchmarks.layer import PRODUCTS, UPDATE, Block, Measured, Size, measure
from benchmarks.ratios import Pairs
from benchmarks.sections.linear import NOTE, QUICK_SIZES, SIZES, rates
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, Target, at_most

SINGLE, RUNS = (1, 1), (1, 16)
NAMES: dict[Block, str] = {
    SINGLE: "single weights",
    RUNS: "runs of 16",
    128: "128 tiles",
    64: "64 tiles",
    32: "32 tiles",
}
FP32 = {SINGLE: at_most(1.1), RUNS: at_most(1.1)}
BF16 = {128: at_most(1.1), 64: at_most(1.1), 32: at_most(1.1), SINGLE: at_most(1.5)}
_WITH_UPDATE = (
    " `with the update` adds the optimizer's step: `ActiveAdamW` beside fused `torch.optim.AdamW`, moments of the "
    "dtype of the weights; in bf16 the first rounds stochastically."
)


def single(settings: Settings) -> list[Table]:
    return [_table("Single weights and runs", "fp32", torch.float32, FP32, settings)]


def bf16(settings: Settings) -> list[Table]:
    return [_table("bf16", "bf16", torch.bfloat16, BF16, settings)]


def _table(title: str, name: str, dtype: torch.dtype, targets: dict[Block, Target], settings: Settings) -> Table:
    rows = [row for size in settings.size(SIZES, QUICK_SIZES) for row in _rows(size, dtype, targets, settings)]
    return Table(title, "sparse / dense", NOTE.format(dtype=name) + _WITH_UPDATE, rows)


def _rows(size: Size, dtype: torch.dtype, targets: dict[Block, Target], settings: Settings) -> list[Row]:
    layers = measure(size, targets, dtype, settings, (*PRODUCTS, UPDATE))
    return [
        _row(f"{NAMES[block]}, {size}", size, target, layer)
        for (block, target), layer in zip(targets.items(), layers, strict=True)
    ]


def _row(what: str, size: Size, target: Target, layer: Measured) -> Row:
    more = {part: f"{statistics.median(layer.parts[part].costs):.2f}" for part in PRODUCTS}
    more["with the update"] = f"{statistics.median(Pairs.of_sum(layer.parts.values()).costs):.2f}"
    more["dense GFLOP/s"] = rates(layer.products, len(PRODUCTS) * size.flops, layer.density)["dense GFLOP/s"]
    return Row(what, layer.kernels, layer.products.costs, target, more)
