"""Where blocks or the dtype leave nothing to skip: sparse products take hardly longer than dense ones."""

from __future__ import annotations

import statistics

import torch

from benchmarks.layer import PRODUCTS, UPDATE, Block, Layers, Size, measure
from benchmarks.ratios import Clock, Pairs
from benchmarks.sections.linear import NOTE, QUICK_SIZES, SIZES
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
    " The last column adds the optimizer's step: `ActiveAdamW` beside fused `torch.optim.AdamW`, moments of the dtype "
    "of the weights; in bf16 the first rounds stochastically."
)


def single(settings: Settings) -> list[Table]:
    return [_table("Single weights and runs", "fp32", torch.float32, FP32, settings)]


def bf16(settings: Settings) -> list[Table]:
    return [_table("bf16", "bf16", torch.bfloat16, BF16, settings)]


def _table(title: str, name: str, dtype: torch.dtype, targets: dict[Block, Target], settings: Settings) -> Table:
    clock = Clock(settings.device)
    sizes = settings.size(SIZES, QUICK_SIZES)
    rows = [_row(size, block, dtype, target, settings, clock) for block, target in targets.items() for size in sizes]
    return Table(title, "sparse / dense", NOTE.format(dtype=name) + _WITH_UPDATE, rows)


def _row(size: Size, block: Block, dtype: torch.dtype, target: Target, settings: Settings, clock: Clock) -> Row:
    layers = Layers(size, block, dtype, settings.device)
    found = measure(layers, (*PRODUCTS, UPDATE), settings, clock)
    more = {part: f"{statistics.median(found[part].costs):.2f}" for part in PRODUCTS}
    more["with the update"] = f"{statistics.median(Pairs.of_sum(found.values()).costs):.2f}"
    together = Pairs.of_sum(found[part] for part in PRODUCTS)
    return Row(f"{NAMES[block]}, {size}", layers.kernels, together.costs, target, more)
