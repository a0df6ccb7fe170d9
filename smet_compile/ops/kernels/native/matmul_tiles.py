"""masked_matmul and sampled_matmul with tiles on the CPU: fp32, and bf16 where the processor multiplies it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Index, Layout, split_index, whole_index
from smet_compile.ops.kernels.native.build import library

_BYTES_OF_A_CHUNK = 2**19
"""As much input as stays in a core's cache while all blocks pass by."""
_MIN_TOKENS = 56
_TOKENS_OF_A_SUM = 256
_DEPTH = {torch.float32: 1, torch.bfloat16: 2}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class _Masked(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "values", "bias", "out", "scratch")),
        *((name, ctypes.c_void_p) for name in ("positions", "by_column", "starts")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "input_stride", "out_stride", "num_lines")),
        *((name, ctypes.c_int64) for name in ("block_rows", "block_cols", "bm", "bn", "rows", "cols")),
        *((name, ctypes.c_int64) for name in ("tokens_at_once", "transposed", "num_threads")),
    ]


class _Sampled(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("left", "right", "out", "scratch", "positions", "starts")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "left_stride", "right_stride", "num_lines")),
        *((name, ctypes.c_int64) for name in ("block_rows", "block_cols", "bm", "bn", "rows", "cols")),
        *((name, ctypes.c_int64) for name in ("tokens_at_once", "num_threads")),
    ]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether these kernels can be had for ``dtype`` on this machine."""
    if dtype not in _NAMES:
        return False
    lib = library("tiles")
    return lib is not None and (dtype == torch.float32 or bool(lib.has_bf16()))


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
    """As ``ops.matmul.masked_matmul``, for tiles."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    lists = _lists(topology, index, layout, values.shape[0])
    tokens, values = _rows_in_order(input), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = tokens.new_empty(*tokens.shape[:-1], layout.rows if transposed else layout.cols)
    starts = lists.row_starts if transposed else lists.column_starts
    lines = layout.block_rows if transposed else layout.block_cols
    scratch = _scratch_of_weights(layout, values, transposed)
    job = _Masked(
        values=values.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        scratch=scratch.data_ptr(),
        positions=_pointer(lists.positions),
        by_column=None if transposed else _pointer(lists.by_column),
        num_lines=lines,
        transposed=transposed,
        tokens_at_once=_tokens_at_once(tokens),
        **_geometry(layout),
    )
    for matrix_number, (part, out_part) in enumerate(_parts(tokens, out, offsets, layout)):
        job.input, job.out, job.num_tokens = part.data_ptr(), out_part.data_ptr(), part.shape[0]
        job.input_stride, job.out_stride = part.stride(0), out_part.stride(0)
        job.starts = _pointer(starts) + 4 * matrix_number * lines
        if part.shape[0]:  # else its blocks would be repacked for nothing
            _call("masked", values.dtype, job)
    if offsets is not None:
        rest = out[int(offsets[-1]) :]
        rest.zero_() if bias is None else rest.copy_(bias)
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
    """As ``ops.matmul.sampled_matmul``, for tiles."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    lists = _lists(topology, index, layout, num_active)
    left_tokens, right_tokens = _rows_in_order(left), _rows_in_order(right)
    out = left.new_empty(layout.values_shape(num_active), dtype=torch.float32)
    depth = _DEPTH[left.dtype]
    tokens_at_once = min(_TOKENS_OF_A_SUM, max(1, left_tokens.shape[-2]))
    steps = -(-tokens_at_once // depth)
    width = layout.block_rows * layout.block_shape[0] + layout.block_cols * _padded(layout.block_shape[1])
    scratch = left.new_empty(steps * width * depth)
    job = _Sampled(
        out=out.data_ptr(),
        scratch=scratch.data_ptr(),
        positions=_pointer(lists.positions),
        num_lines=layout.block_rows,
        tokens_at_once=tokens_at_once,
        **_geometry(layout),
    )
    for matrix_number, (part, right_part) in enumerate(_parts(left_tokens, right_tokens, offsets, layout)):
        job.left, job.right, job.num_tokens = part.data_ptr(), right_part.data_ptr(), part.shape[0]
        job.left_stride, job.right_stride = part.stride(0), right_part.stride(0)
        job.starts = _pointer(lists.row_starts) + 4 * matrix_number * layout.block_rows
        _call("sampled", left.dtype, job)
    return out.to(left.dtype)


def _call(name: str, dtype: torch.dtype, job: ctypes.Structure) -> None:
    lib = library("tiles")
    assert lib is not None, "chosen only where it compiled"
    getattr(lib, f"{name}_{_NAMES[dtype]}")(ctypes.byref(job))


def _lists(topology: Tensor, index: list[Tensor], layout: Layout, num_active: int) -> Index:
    whole = whole_index(index, topology, layout, num_active)
    assert whole.dtype == torch.int32, "a weight of 2^31 tiles is none for a CPU"
    return split_index(whole, layout, num_active)


def _pointer(tensor: Tensor | None) -> int:
    assert tensor is not None
    return tensor.data_ptr()


def _geometry(layout: Layout) -> dict[str, Any]:
    bm, bn = layout.block_shape
    return {
        "block_rows": layout.block_rows,
        "block_cols": layout.block_cols,
        "bm": bm,
        "bn": bn,
        "rows": layout.rows,
        "cols": layout.cols,
        "num_threads": torch.get_num_threads(),
    }


def _rows_in_order(tokens: Tensor) -> Tensor:
    """Each token's numbers side by side in memory; where not, a copy."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _parts(a: Tensor, b: Tensor, offsets: Tensor | None, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """Each matrix's tokens of two tensors, as views."""
    if offsets is not None:
        ends = offsets.tolist()
        return [(a[start:end], b[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return [(a, b)] if a.dim() == 2 else list(zip(a.unbind(), b.unbind(), strict=True))


def _tokens_at_once(tokens: Tensor) -> int:
    row_bytes = tokens.shape[-1] * tokens.element_size()
    return max(_MIN_TOKENS, _BYTES_OF_A_CHUNK // row_bytes // _MIN_TOKENS * _MIN_TOKENS)


def _padded(width: int) -> int:
    lib = library("tiles")
    assert lib is not None
    lanes: int = lib.lanes()
    return -(-width // lanes) * lanes


def _scratch_of_weights(layout: Layout, values: Tensor, transposed: bool) -> Tensor:
    """One matrix's blocks, repacked: at most all of them."""
    bm, bn = layout.block_shape
    width, depth = (bm, bn) if transposed else (bn, bm)
    padded_depth = -(-depth // _DEPTH[values.dtype]) * _DEPTH[values.dtype]
    num_blocks = min(values.shape[0], layout.block_rows * layout.block_cols)
    return values.new_empty(num_blocks * padded_depth * _padded(width))
