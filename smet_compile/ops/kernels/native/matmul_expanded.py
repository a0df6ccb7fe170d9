"""masked_matmul and sampled_matmul through a dense weight on the CPU: expanded a few rows at a time, each a GEMM.

For single weights and runs, and for tiles where the processor multiplies dense matrices faster than it can skip. Those
rows stay in the processor's cache, so that expanding costs little and the scratch is small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops.kernels.native import expand
from smet_compile.ops.matmul import by_matrix, multiply_stack, zeros_or_bias

_BYTES_AT_ONCE = 2**23
_MIN_ROWS = 256


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """As ``ops.matmul.masked_matmul``.

    Where the rows are what is summed over, all of them are expanded at once for the low-precision dtypes, so that sums
    are rounded once.
    """
    layout = Layout.of_lists(shape, matrix, block_shape)
    ends = None if offsets is None else offsets.tolist()
    if not transposed and input.dtype.itemsize < 4:
        dense_SRC = expand.unpack(values, topology, index, shape, matrix, block_shape).view(-1, *matrix)
        return multiply_stack(input, dense_SRC, bias, ends)
    out = zeros_or_bias(input, layout.rows if transposed else layout.cols, bias)
    pairs = zip(by_matrix(input, ends), by_matrix(out, ends), strict=True)
    for number, (input_TI, out_TO) in enumerate(pairs):
        for rows, scratch in _rows_at_once(layout, values):
            expand.unpack_rows(scratch, values, topology, index, layout, _counted(rows, number, layout))
            if transposed:
                part = out_TO[:, rows]
                torch.addmm(part, input_TI, scratch.mT, beta=int(bias is not None), out=part)
            else:
                out_TO.addmm_(input_TI[:, rows], scratch)
    return out


def sampled_matmul(
    left: Tensor,
    right: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
    offsets: Tensor | None = None,
) -> Tensor:
    """As ``ops.matmul.sampled_matmul``; the dense product is never whole."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    values = left.new_empty(layout.values_shape(num_active))
    ends = None if offsets is None else offsets.tolist()
    pairs = zip(by_matrix(left, ends), by_matrix(right, ends), strict=True)
    for number, (left_TR, right_TC) in enumerate(pairs):
        for rows, scratch in _rows_at_once(layout, values):
            torch.mm(left_TR[:, rows].mT, right_TC, out=scratch)
            expand.pack_rows(values, scratch, topology, index, layout, _counted(rows, number, layout))
    return values


def _rows_at_once(layout: Layout, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Whole block rows of one matrix, and scratch for their dense weights."""
    bm = layout.block_shape[0]
    num_rows = max(_MIN_ROWS, _BYTES_AT_ONCE // (layout.cols * like.element_size()))
    num_rows = min(-(-num_rows // bm) * bm, layout.rows)
    scratch = like.new_empty(num_rows, layout.cols)
    for first in range(0, layout.rows, num_rows):
        rows = slice(first, min(first + num_rows, layout.rows))
        yield rows, scratch[: rows.stop - first]


def _counted(rows: slice, number: int, layout: Layout) -> slice:
    """Rows of matrix ``number``, counted through all matrices."""
    return slice(number * layout.rows + rows.start, number * layout.rows + rows.stop)
