"""Implements the kernel named "cpu_tiles": products with tiles in C++, in fp32, and in bf16 where the CPU has it."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.choose import Case
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.plain import by_matrix, with_rows_in_order

_BYTES_OF_A_CHUNK = 2**19
"""Bytes of input that stay in a core's cache while all blocks are multiplied with them."""
_MIN_TOKENS = 56
_TOKENS_OF_A_SUM = 256
_DEPTH = {torch.float32: 1, torch.bfloat16: 2}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class _Masked(ctypes.Structure):
    """Holds the arguments of a product, as ``Masked`` in tiles.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "values", "bias", "out", "scratch")),
        *((name, ctypes.c_void_p) for name in ("positions", "by_column", "starts")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "input_stride", "out_stride", "num_lines")),
        *((name, ctypes.c_int64) for name in ("block_rows", "block_cols", "bm", "bn", "rows", "cols")),
        *((name, ctypes.c_int64) for name in ("tokens_at_once", "transposed", "num_threads")),
    ]


class _Sampled(ctypes.Structure):
    """Holds the arguments of a product's active blocks, as ``Sampled`` in tiles.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("left", "right", "out", "scratch", "positions", "starts")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "left_stride", "right_stride", "num_lines")),
        *((name, ctypes.c_int64) for name in ("block_rows", "block_cols", "bm", "bn", "rows", "cols")),
        *((name, ctypes.c_int64) for name in ("tokens_at_once", "num_threads")),
    ]


class _PreparedMasked(NamedTuple):
    """Holds the arguments of ``masked_matmul`` that stay the same until the topology changes.

    Args:
        job: the arguments except those that depend on the tokens, the values and the bias.
        starts: the address of the first line of each matrix.
        num_outputs: number of outputs of a token. scratch_size: most entries that a matrix's repacked blocks take.
    """

    job: _Masked
    starts: list[int]
    num_outputs: int
    scratch_size: int


class _PreparedSampled(NamedTuple):
    """Holds the arguments of ``sampled_matmul`` that stay the same until the topology changes.

    Args:
        job: the arguments except those that depend on the tokens.
        starts: the address of the first block row of each matrix.
        scratch_width: entries that one repacked token takes.
    """

    job: _Sampled
    starts: list[int]
    scratch_width: int


def refusal(case: Case) -> str | None:
    """Says why products of the case cannot be computed by these functions; None where they can."""
    if not case.layout.tiles:
        return "multiplies tiles only"
    lib = library("tiles")
    if lib is None:
        return "could not be compiled"
    is_known = case.dtype == torch.float32 or (case.dtype == torch.bfloat16 and bool(lib.has_bf16()))
    return None if is_known else f"does not multiply {case.dtype} here"


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes what ``ops.plain.masked_matmul`` does, for tiles."""
    dtype = values.dtype
    key = ("cpu_tiles", transposed, dtype)
    prepared: _PreparedMasked = topology.constant(key, lambda: _prepare_masked(topology, transposed, dtype))
    tokens, values = with_rows_in_order(input), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = tokens.new_empty(*tokens.shape[:-1], prepared.num_outputs)
    scratch = values.new_empty(prepared.scratch_size)
    job = _Masked.from_buffer_copy(prepared.job)  # other threads may use the prepared one
    job.values, job.scratch, job.num_threads = values.data_ptr(), scratch.data_ptr(), torch.get_num_threads()
    job.bias = None if bias is None else bias.data_ptr()
    ends = None if offsets is None else offsets.tolist()
    for starts, part, out_part in zip(prepared.starts, by_matrix(tokens, ends), by_matrix(out, ends), strict=True):
        job.input, job.out, job.starts = part.data_ptr(), out_part.data_ptr(), starts
        job.num_tokens = part.shape[0]
        job.input_stride, _ = part.stride()
        if part.shape[0]:  # else its blocks would be repacked for nothing
            _call("masked", dtype, job)
    if ends is not None:
        rest = out[ends[-1] :]
        rest.zero_() if bias is None else rest.copy_(bias)
    return out


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Computes what ``ops.plain.sampled_matmul`` does, for tiles."""
    dtype = left.dtype
    prepared: _PreparedSampled = topology.constant(("cpu_tiles", dtype), lambda: _prepare_sampled(topology, dtype))
    left, right = with_rows_in_order(left), with_rows_in_order(right)
    out = left.new_empty(topology.layout.values_shape(topology.num_active), dtype=torch.float32)
    tokens_at_once = min(_TOKENS_OF_A_SUM, max(1, left.shape[-2]))
    padded_tokens = -(-tokens_at_once // _DEPTH[dtype]) * _DEPTH[dtype]
    scratch = left.new_empty(padded_tokens * prepared.scratch_width)
    job = _Sampled.from_buffer_copy(prepared.job)  # other threads may use the prepared one
    job.out, job.scratch = out.data_ptr(), scratch.data_ptr()
    job.tokens_at_once, job.num_threads = tokens_at_once, torch.get_num_threads()
    ends = None if offsets is None else offsets.tolist()
    for starts, left_part, right_part in zip(
        prepared.starts, by_matrix(left, ends), by_matrix(right, ends), strict=True
    ):
        job.left, job.right, job.starts = left_part.data_ptr(), right_part.data_ptr(), starts
        job.num_tokens = left_part.shape[0]
        (job.left_stride, _), (job.right_stride, _) = left_part.stride(), right_part.stride()
        _call("sampled", dtype, job)
    return out if dtype == torch.float32 else out.to(dtype)


def _call(name: str, dtype: torch.dtype, job: ctypes.Structure) -> None:
    lib = library("tiles")
    assert lib is not None, "the kernel is chosen only where it compiled"
    getattr(lib, f"{name}_{_NAMES[dtype]}")(ctypes.byref(job))


def _prepare_masked(topology: Topology, transposed: bool, dtype: torch.dtype) -> _PreparedMasked:
    layout = topology.layout
    positions, by_column = topology.positions, topology.by_column
    starts = topology.row_starts if transposed else topology.column_starts
    assert positions is not None and by_column is not None and starts is not None
    num_lines = layout.block_rows if transposed else layout.block_cols
    num_outputs, num_inputs = layout.matrix if transposed else layout.matrix[::-1]
    width, depth = layout.block_shape if transposed else layout.block_shape[::-1]
    padded_depth = -(-depth // _DEPTH[dtype]) * _DEPTH[dtype]
    num_blocks = min(topology.num_active, layout.block_rows * layout.block_cols)
    at_once = _BYTES_OF_A_CHUNK // (num_inputs * dtype.itemsize) // _MIN_TOKENS * _MIN_TOKENS
    job = _Masked(
        positions=positions.data_ptr(),
        by_column=None if transposed else by_column.data_ptr(),
        num_lines=num_lines,
        transposed=transposed,
        out_stride=num_outputs,
        tokens_at_once=max(_MIN_TOKENS, at_once),
        **_geometry(topology),
    )
    scratch_size = num_blocks * padded_depth * _padded(width)
    return _PreparedMasked(job, _starts(starts, num_lines, layout.num_matrices), num_outputs, scratch_size)


def _prepare_sampled(topology: Topology, dtype: torch.dtype) -> _PreparedSampled:
    layout = topology.layout
    positions, starts = topology.positions, topology.row_starts
    assert positions is not None and starts is not None
    bm, bn = layout.block_shape
    job = _Sampled(positions=positions.data_ptr(), num_lines=layout.block_rows, **_geometry(topology))
    scratch_width = layout.block_rows * bm + layout.block_cols * _padded(bn)
    return _PreparedSampled(job, _starts(starts, layout.block_rows, layout.num_matrices), scratch_width)


def _geometry(topology: Topology) -> dict[str, Any]:
    layout = topology.layout
    bm, bn = layout.block_shape
    assert topology.lists.dtype == torch.int32, "a weight of 2^31 tiles does not fit in a CPU's memory"
    return {
        "block_rows": layout.block_rows,
        "block_cols": layout.block_cols,
        "bm": bm,
        "bn": bn,
        "rows": layout.rows,
        "cols": layout.cols,
    }


def _starts(starts: Tensor, num_lines: int, num_matrices: int) -> list[int]:
    """Returns the address of each matrix's first line in the list of all matrices."""
    return [starts.data_ptr() + starts.element_size() * num_lines * matrix for matrix in range(num_matrices)]


def _padded(width: int) -> int:
    lib = library("tiles")
    assert lib is not None
    lanes: int = lib.lanes()
    return -(-width // lanes) * lanes
