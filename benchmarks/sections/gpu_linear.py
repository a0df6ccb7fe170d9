"""Measures the three products of a linear layer on a GPU against the vendor's dense GEMM, and the bound by L2."""

from __future__ import annotations

import statistics

import torch

from benchmarks.layer import DENSITY, PRODUCTS, Measured, Size, measure
from benchmarks.ratios import Clock, Pairs
from benchmarks.settings import Settings
from benchmarks.tables import AWAITS_GPU, Row, Table, at_least, at_most

TARGETS = {128: 0.8, 64: 0.5, 32: 0.25}
OF_THE_BOUND = at_least(0.85)
SINGLE_WEIGHTS = at_most(1.08)
SIZES = (Size(16384, 4096, 4096), Size(16384, 4096, 11008))
QUICK_SIZES = (Size(64, 128, 512),)
DTYPE = torch.bfloat16
PROGRAM_SIDE = 256
"""Tokens (of a weight gradient: columns) that one program takes, the most that its registers hold sums for."""
L2_BYTES, L2_READS = 2**24, 256
NOTE = (
    f"bf16, density {DENSITY}, device time between events, the L2 cache flushed before each product. Useful operations "
    "are those of active blocks. A program that makes a by b outputs reads 2 (a + b) bytes from L2 for 2 a b "
    f"operations; with a = {PROGRAM_SIDE} and b the tile's side, operations a second are at most L2's bandwidth times "
    "a b / (a + b). The bound is that, over the speed of the dense product, at most 1."
)


def tables(settings: Settings) -> list[Table]:
    place = settings.on_gpu()
    sizes = settings.size(SIZES, QUICK_SIZES)
    bandwidth = l2_bandwidth(place) if place else None
    note = NOTE + (f" Measured bandwidth: {bandwidth / 1e12:.2f} TB/s." if bandwidth else "")
    tiles = [row for size in sizes for row in _tile_rows(size, place, bandwidth or 0)]
    single = [row for size in sizes for row in _single_rows(size, place)]
    return [
        Table("Linear layers of tiles on a GPU", "useful operations a second, sparse / dense", note, tiles),
        Table("Linear layers of single weights on a GPU", "sparse / dense", "As above.", single),
    ]


def _tile_rows(size: Size, place: Settings | None, bandwidth: float) -> list[Row]:
    layers = measure(size, TARGETS, DTYPE, place) if place else [None] * len(TARGETS)
    return [
        _tile_row(f"{part}, {block} tiles, {size}", part, size, block, layer, bandwidth)
        for block, layer in zip(TARGETS, layers, strict=True)
        for part in PRODUCTS
    ]


def _tile_row(what: str, part: str, size: Size, block: int, layer: Measured | None, bandwidth: float) -> Row:
    target = at_least(TARGETS[block])
    if layer is None:
        return Row(what, target=target, unmeasured=AWAITS_GPU)
    pairs = layer.parts[part]
    more = _beside_the_bound(pairs, size.flops, block, layer.density, bandwidth)
    return Row(what, layer.kernels, [layer.density * speedup for speedup in pairs.speedups], target, more)


def _beside_the_bound(pairs: Pairs, flops: int, block: int, density: float, bandwidth: float) -> dict[str, str]:
    dense, sparse = pairs.medians
    bound = min(1, l2_bound(block, bandwidth) / (flops / dense))
    of_the_bound = density * dense / sparse / bound
    return {
        "dense TFLOP/s": f"{flops / dense / 1e12:.3g}",
        "bound": f"{bound:.2f}",
        f"of the bound {OF_THE_BOUND}": f"{of_the_bound:.2f}: {OF_THE_BOUND.verdict(of_the_bound)}",
    }


def _single_rows(size: Size, place: Settings | None) -> list[Row]:
    if place is None:
        return [Row(f"{part}, {size}", target=SINGLE_WEIGHTS, unmeasured=AWAITS_GPU) for part in PRODUCTS]
    (layer,) = measure(size, [1], DTYPE, place)
    return [Row(f"{part}, {size}", layer.kernels, layer.parts[part].costs, SINGLE_WEIGHTS) for part in PRODUCTS]


def l2_bound(block: int, bandwidth: float) -> float:
    """Operations a second of programs that read all they multiply from L2, at ``bandwidth`` bytes a second."""
    return bandwidth * PROGRAM_SIDE * block / (PROGRAM_SIDE + block) * 2 / DTYPE.itemsize


def l2_bandwidth(place: Settings) -> float:
    """Bytes a second of sums that read one tensor again and again that L2 holds: what torch gets out of it."""
    reads = place.size(L2_READS, 2)
    held = torch.zeros(L2_BYTES // 4, device=place.device).expand(reads, -1)
    clock = Clock(place.device)
    seconds = [clock.seconds(lambda: held.sum(1)) for _ in range(place.repeats + 1)][1:]
    return reads * L2_BYTES / statistics.median(seconds)
