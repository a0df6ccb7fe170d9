"""Times the three products of a linear layer beside the vendor's dense ones, then kernels of other sizes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from benchmarks.gpu_check.cases import BY_NAME, DTYPE, Case, Layer, computes, forced
from benchmarks.gpu_check.ceilings import median_seconds
from benchmarks.gpu_check.records import Check
from benchmarks.layer import FORWARD, INPUT_GRADIENT, PRODUCTS, WEIGHT_GRADIENT, Size, measure
from benchmarks.ratios import Clock
from smet_compile.format import Topology
from smet_compile.ops.kernels.triton import supports
from smet_compile.ops.kernels.triton.supports import MaskedSizes, SampledSizes

TOKENS = 16384
SIZES = (
    Size(TOKENS, 4096, 4096),
    Size(TOKENS, 4096, 11008),
    Size(TOKENS, 1024, 2736),
    Size(TOKENS, 2048, 5461),
    Size(2048, 4096, 4096),
)
TINY_SIZES, TINY_SIZES_BY_NAME = (Size(16, 32, 32),), (Size(16, 64, 64),)
REPEATS, REPEATS_OF_SWEEP = 7, 3
WARPS = ((128, 4), (128, 8), (256, 8))
"""Outputs along the longer side of a program, and its warps."""
STEPS, STAGES = (32, 64), (3, 4)
SIDES_OF_SWEEP = (128, 64, 32)
Sizes = MaskedSizes | SampledSizes


def run(check: Check) -> None:
    for kernel, sides, sizes in (
        ("triton_tiles", check.size(SIDES_OF_SWEEP, (16,)), check.size(SIZES, TINY_SIZES)),
        ("triton_expand", (1,), check.size(SIZES, TINY_SIZES)),
        (BY_NAME, check.size(SIDES_OF_SWEEP, (32,)), check.size(SIZES, TINY_SIZES_BY_NAME)),
    ):
        by = {"by": BY_NAME} if kernel == BY_NAME else {}
        for size in sizes:
            with check.attempt("product", size=str(size), **by), forced(kernel):
                _measure_products(check, size, sides, by)
    sweep(check)


def _measure_products(check: Check, size: Size, sides: tuple[int, ...], by: dict[str, str]) -> None:
    for block, layer in zip(sides, measure(size, sides, DTYPE, check.settings(REPEATS)), strict=True):
        for part in (part for part in PRODUCTS if computes(by.get("by", ""), part, block)):
            pairs = layer.parts[part]
            dense, sparse = pairs.medians
            check.record(
                "product",
                size=str(size),
                block=block,
                part=part,
                **by,
                kernels=layer.kernels,
                density=layer.density,
                dense_seconds=dense,
                seconds=sparse,
                ratios=[round(cost, 4) for cost in pairs.costs],
                dense_operations_a_second=size.flops / dense,
                useful_share=layer.density * dense / sparse,
            )


def sweep(check: Check) -> None:
    """Times programs of other sizes on one layer of each side of a tile."""
    clock = Clock(check.device)
    for block in check.size(SIDES_OF_SWEEP, (16,)):
        layer = sweep_layer(check, block)
        for part, sizes in candidates(check):
            fields = {"case": str(layer.case), "part": part, "sizes": sizes._asdict()}
            with check.attempt("sizes", **fields), with_sizes(layer, sizes):
                work = functools.partial(layer.product, part, "triton_tiles")
                seconds = median_seconds(clock, work, check.size(REPEATS_OF_SWEEP, 1))
                check.record("sizes", **fields, seconds=seconds)


def sweep_layer(check: Check, block: int) -> Layer:
    side = check.size(4096, 32)
    return Layer(Case(side, side, block, check.size(TOKENS, 16)), check.device)


def candidates(check: Check) -> Iterator[tuple[str, Sizes]]:
    """Yields a product and the sizes of its programs. The interpreter's programs have one stage and few lanes."""
    if check.dry:
        yield FORWARD, MaskedSizes(16, 16, 4, 1)
        yield WEIGHT_GRADIENT, SampledSizes(16, 16, 4, 1)
        return
    for (length, warps), step, stages in itertools.product(WARPS, STEPS, STAGES):
        for part in (FORWARD, INPUT_GRADIENT):
            yield part, MaskedSizes(length, step, warps, stages)
        yield WEIGHT_GRADIENT, SampledSizes(length, step, warps, stages)


@contextmanager
def with_sizes(layer: Layer, sizes: Sizes) -> Iterator[None]:
    """Lets launches for the layer's weight be prepared anew, with these sizes."""
    name = "masked_sizes" if isinstance(sizes, MaskedSizes) else "sampled_sizes"
    before = layer.topology
    layer.topology = Topology(before.layout, before.bits, before.lists, before.num_active)
    with mock.patch.object(supports, name, lambda *_: sizes):
        yield
    layer.topology = before
