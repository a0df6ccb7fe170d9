"""Sums over tokens in parts: how many, and their sum."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import triton
import triton.language as tl

from smet_compile.format import Layout
from smet_compile.ops.kernels.triton import configs

_MOST_SPLITS = 16
_COST_OF_A_SPLIT = 1000
"""Multiply-adds that take as long as writing and reading one fp32: some 8 bytes at 3 TB/s, beside 350 T a second."""
_PROGRAMS_PER_SM = 2


@triton.jit
def add_splits(parts, out, numel, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of ``NUM_SPLITS`` parts of ``numel`` fp32 each, first to last."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < numel
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + tl.cast(split, tl.int64) * numel + offset, mask=inside, other=0.0)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)


def num_splits(sms: int, layout: Layout, tokens: int, num_active: int, blocks_together: int, step: int) -> int:
    """Parts to sum the ``tokens`` of a matrix in, of which the time is least, in multiply-adds of one output.

    Programs of ``blocks_together`` blocks run in rounds of two to each of the ``sms`` multiprocessors, and each part of
    a sum costs its writing and reading.
    """
    bm, bn = layout.block_shape
    lines = min(num_active, layout.num_matrices * layout.block_rows)
    parts_of_block = triton.cdiv(bm, configs.WIDEST) * triton.cdiv(bn, configs.WIDEST)
    programs = parts_of_block * (num_active / blocks_together + lines * (1 - 1 / blocks_together) / 2)
    at_once = _PROGRAMS_PER_SM * sms

    def cost(splits: int) -> float:
        rounds = math.ceil(programs * splits / at_once)
        return rounds * at_once / programs * tokens / splits + (splits > 1) * splits * _COST_OF_A_SPLIT

    most = max(1, min(_MOST_SPLITS, tokens // (4 * step)))
    return min(range(1, most + 1), key=cost)
