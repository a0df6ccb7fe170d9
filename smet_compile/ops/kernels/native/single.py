"""Implements the kernel named "cpu_single": products with single weights, and runs along a row, in C++ and fp32.

Only active weights are multiplied. It is faster than expanding dense rows where few enough are active. Tensors of 16
bits are converted to fp32 and results rounded once, as converting costs little beside the product.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.choose import Case
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.kernels.native.expand import HALF, masked_in_fp32
from smet_compile.ops.plain import by_matrix, with_rows_in_order

_MOST_PLACES = 2**24
"""Rows or columns of a matrix: an entry counts the bytes to its tokens in 32 bits."""


class _Active(ctypes.Structure):
    """Holds the active weights of a matrix, as ``Active`` in entries.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bits", "group_starts")),
        ("group_starts_are_wide", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("positions_are_wide", "num_active", "first_row", "rows", "cols", "bn")),
    ]


class _Masked(ctypes.Structure):
    """Holds the arguments of a product, as ``Masked`` in single.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "values", "bias", "out")),
        ("weight", _Active),
        *((name, ctypes.c_int64) for name in ("num_tokens", "input_stride", "out_stride", "transposed", "num_threads")),
    ]


class _Sampled(ctypes.Structure):
    """Holds the arguments of a product's active weights, as ``Sampled`` in single.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("left", "right", "out")),
        ("weight", _Active),
        *((name, ctypes.c_int64) for name in ("num_tokens", "left_stride", "right_stride", "num_threads")),
    ]


def refusal(case: Case) -> str | None:
    """Says why products of the case cannot be computed by these functions; None where they can."""
    if case.layout.block_shape[0] > 1:
        return "multiplies single weights and runs along a row only"
    if case.dtype not in (torch.float32, *HALF):
        return f"does not multiply {case.dtype}"
    if max(case.layout.matrix) >= _MOST_PLACES:
        return f"multiplies matrices of less than {_MOST_PLACES} rows and columns"
    return "could not be compiled" if library("single") is None else None


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes what ``ops.plain.masked_matmul`` does, for single weights and runs along a row."""
    if input.dtype in HALF:
        return masked_in_fp32(masked_matmul, input, values, topology, transposed, bias, offsets)
    layout = topology.layout
    tokens, values = with_rows_in_order(input), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_outputs = layout.rows if transposed else layout.cols
    out = tokens.new_empty(*tokens.shape[:-1], num_outputs)
    job = _Masked(
        values=values.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out_stride=num_outputs,
        weight=_active(topology),
        transposed=transposed,
        num_threads=torch.get_num_threads(),
    )
    ends = None if offsets is None else offsets.tolist()
    parts = zip(by_matrix(tokens, ends), by_matrix(out, ends), strict=True)
    for matrix, (part, out_part) in enumerate(parts):
        job.input, job.out, job.weight.first_row = part.data_ptr(), out_part.data_ptr(), matrix * layout.rows
        job.num_tokens, job.input_stride = part.shape[0], part.stride(0)
        if part.shape[0]:  # else weights would be listed for nothing
            _call("masked", job)
    if ends is not None:
        rest = out[ends[-1] :]
        rest.zero_() if bias is None else rest.copy_(bias)
    return out


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Computes what ``ops.plain.sampled_matmul`` does, for single weights and runs along a row."""
    if left.dtype in HALF:
        return sampled_matmul(left.float(), right.float(), topology, offsets).to(left.dtype)
    layout = topology.layout
    left, right = with_rows_in_order(left), with_rows_in_order(right)
    out = left.new_empty(layout.values_shape(topology.num_active))
    job = _Sampled(out=out.data_ptr(), weight=_active(topology), num_threads=torch.get_num_threads())
    ends = None if offsets is None else offsets.tolist()
    parts = zip(by_matrix(left, ends), by_matrix(right, ends), strict=True)
    for matrix, (left_part, right_part) in enumerate(parts):
        job.left, job.right, job.weight.first_row = left_part.data_ptr(), right_part.data_ptr(), matrix * layout.rows
        job.num_tokens, job.left_stride, job.right_stride = len(left_part), left_part.stride(0), right_part.stride(0)
        _call("sampled", job)
    return out


def _call(name: str, job: ctypes.Structure) -> None:
    lib = library("single")
    assert lib is not None, "the kernel is chosen only where it compiled"
    getattr(lib, f"{name}_fp32")(ctypes.byref(job))


def _active(topology: Topology) -> _Active:
    """Returns the active weights, beginning with the first matrix; the topology keeps them, a call copies them."""
    active: _Active = topology.constant("cpu_single", lambda: _prepare(topology))
    return active


def _prepare(topology: Topology) -> _Active:
    layout, positions, group_starts = topology.layout, topology.positions, topology.group_starts
    assert group_starts is not None
    is_wide = group_starts.dtype == torch.int64
    return _Active(
        bits=topology.bits.data_ptr(),
        group_starts=group_starts.data_ptr(),
        group_starts_are_wide=is_wide,
        positions=None if positions is None else positions.data_ptr(),
        positions_are_wide=is_wide,
        num_active=topology.num_active,
        rows=layout.rows,
        cols=layout.cols,
        bn=layout.block_shape[1],
    )
