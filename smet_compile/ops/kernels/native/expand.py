"""Implements the kernel named "cpu_expand": unpack and pack in C++, and products through a dense weight.

Unpacking writes each dense entry once, packing reads it once. Products expand a few rows at a time and call a GEMM:
those rows stay in the processor's cache, so that expanding costs little and the scratch is small. It serves single
weights and runs that ``cpu_single`` does not multiply faster, and tiles where the processor multiplies dense matrices
faster than it can skip blocks.

Shape suffixes: S stacked matrices, T tokens, R rows, C cols, I and O the inputs and outputs of a product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.choose import Case
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.plain import by_matrix, multiply_stack, zeros_or_bias
from smet_compile.ops.torch_insides import multiplies_on_cpu

HALF = (torch.bfloat16, torch.float16)
_SIZES = (2, 4, 8)
_BYTES_AT_ONCE = 2**23
_MIN_ROWS = 256


class _Move(ctypes.Structure):
    """Holds the arguments of the C++ functions, as ``Weights`` in expand.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bits", "index", "values", "dense")),
        *((name, ctypes.c_int64) for name in ("first", "last", "num_active", "block_rows", "block_cols", "bm", "bn")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "element_bytes", "wide_index", "num_threads")),
    ]


class _Piece(NamedTuple):
    """Holds some whole block rows of a matrix that are expanded at once, and the prepared arguments for that."""

    rows: slice
    move: _Move


def refusal(case: Case) -> str | None:
    """Says why weights of the case cannot be moved by these functions; None where they can."""
    if not case.dtype.is_floating_point or case.dtype.itemsize not in _SIZES:
        return f"does not move {case.dtype}"
    return "could not be compiled" if library("expand") is None else None


def unpack(values: Tensor, topology: Topology) -> Tensor:
    """Returns the dense weight of ``values``, new and contiguous."""
    dense = values.new_empty(topology.layout.shape)
    _run("unpack", _whole(topology, values.dtype.itemsize), values.contiguous(), dense)
    return dense


def pack(dense: Tensor, topology: Topology) -> Tensor:
    """Returns the active blocks of ``dense``; entries that hang over an edge are zero."""
    values = dense.new_empty(topology.layout.values_shape(topology.num_active))
    _run("pack", _whole(topology, dense.dtype.itemsize), values, dense.contiguous())
    return values


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes what ``ops.plain.masked_matmul`` does.

    Where it sums over rows of the weight, it expands all of them at once for low-precision dtypes, so that sums are
    rounded once. A processor without instructions for the dtype multiplies in fp32.
    """
    if input.dtype in HALF and not multiplies_on_cpu(input.dtype):
        return masked_in_fp32(masked_matmul, input, values, topology, transposed, bias, offsets)
    layout = topology.layout
    ends = None if offsets is None else offsets.tolist()
    if not transposed and input.dtype.itemsize < 4:
        dense_SRC = unpack(values, topology).view(-1, *layout.matrix)
        return multiply_stack(input, dense_SRC, bias, ends)
    values = values.contiguous()
    pieces_S = _pieces(topology, values.dtype.itemsize)
    if transposed and bias is None and ends is None:  # everything is written below
        out = input.new_empty(*input.shape[:-1], layout.rows)
    else:
        out = zeros_or_bias(input, layout.rows if transposed else layout.cols, bias)
    scratch = _scratch(values, pieces_S, layout.cols)
    for pieces, input_TI, out_TO in zip(pieces_S, by_matrix(input, ends), by_matrix(out, ends), strict=True):
        for rows, move in pieces:
            weight_RC = _first_rows(scratch, rows)
            _run("unpack", move, values, weight_RC)
            if transposed:
                part_TR = _columns(out_TO, rows)
                torch.addmm(part_TR, input_TI, weight_RC.mT, beta=int(bias is not None), out=part_TR)
            else:
                out_TO.addmm_(_columns(input_TI, rows), weight_RC)
    return out


def sampled_matmul(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None = None) -> Tensor:
    """Computes what ``ops.plain.sampled_matmul`` does; the dense product is never whole."""
    if left.dtype in HALF and not multiplies_on_cpu(left.dtype):
        return sampled_matmul(left.float(), right.float(), topology, offsets).to(left.dtype)
    values = left.new_empty(topology.layout.values_shape(topology.num_active))
    ends = None if offsets is None else offsets.tolist()
    pieces_S = _pieces(topology, values.dtype.itemsize)
    scratch = _scratch(values, pieces_S, topology.layout.cols)
    for pieces, left_TR, right_TC in zip(pieces_S, by_matrix(left, ends), by_matrix(right, ends), strict=True):
        for rows, move in pieces:
            product_RC = _first_rows(scratch, rows)
            torch.mm(_columns(left_TR, rows).mT, right_TC, out=product_RC)
            _run("pack", move, values, product_RC)
    return values


def masked_in_fp32(
    multiply: Callable[..., Tensor],
    input: Tensor,
    values: Tensor,
    topology: Topology,
    transposed: bool,
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """Calls a masked product with everything in fp32, and rounds the result to the input's dtype."""
    bias = None if bias is None else bias.float()
    return multiply(input.float(), values.float(), topology, transposed, bias, offsets).to(input.dtype)


def _run(name: str, prepared: _Move, values: Tensor, dense: Tensor) -> None:
    """Calls a C++ function. ``values`` are all of the weight, ``dense`` has its prepared rows; both are contiguous."""
    move = _Move.from_buffer_copy(prepared)  # other threads may use the prepared one
    move.values, move.dense, move.num_threads = values.data_ptr(), dense.data_ptr(), torch.get_num_threads()
    lib = library("expand")
    assert lib is not None, "the kernel is chosen only where it compiled"
    getattr(lib, name)(ctypes.byref(move))


def _whole(topology: Topology, element_bytes: int) -> _Move:
    """Returns the move of all rows; the topology keeps it."""
    layout = topology.layout
    key = ("cpu_expand", "whole", element_bytes)
    return topology.constant(key, lambda: _prepare(topology, element_bytes, 0, layout.num_matrices * layout.rows))


def _pieces(topology: Topology, element_bytes: int) -> list[list[_Piece]]:
    """Returns the pieces of each matrix; the topology keeps them."""
    key = ("cpu_expand", "pieces", element_bytes)
    return topology.constant(key, lambda: _make_pieces(topology, element_bytes))


def _make_pieces(topology: Topology, element_bytes: int) -> list[list[_Piece]]:
    layout = topology.layout
    bm, num_rows = layout.block_shape[0], layout.rows
    at_once = max(_MIN_ROWS, _BYTES_AT_ONCE // (layout.cols * element_bytes))
    at_once = -(-at_once // bm) * bm
    pieces_S = []
    for before in range(0, layout.num_matrices * num_rows, num_rows):  # the rows of earlier matrices
        parts = [slice(first, min(first + at_once, num_rows)) for first in range(0, num_rows, at_once)]
        pieces_S.append(
            [_Piece(rows, _prepare(topology, element_bytes, before + rows.start, before + rows.stop)) for rows in parts]
        )
    return pieces_S


def _prepare(topology: Topology, element_bytes: int, first_row: int, last_row: int) -> _Move:
    """Fills in everything but addresses of values and dense rows, for rows counted through all matrices."""
    layout = topology.layout
    index = topology.group_starts if layout.single_weights else topology.positions
    assert index is not None
    width = layout.cols if layout.single_weights else 1
    return _Move(
        bits=topology.bits.data_ptr(),
        index=index.data_ptr(),
        first=first_row * width,
        last=last_row * width,
        num_active=topology.num_active,
        block_rows=layout.block_rows,
        block_cols=layout.block_cols,
        bm=layout.block_shape[0],
        bn=layout.block_shape[1],
        rows=layout.rows,
        cols=layout.cols,
        element_bytes=element_bytes,
        wide_index=index.dtype == torch.int64,
    )


def _scratch(like: Tensor, pieces_S: list[list[_Piece]], cols: int) -> Tensor:
    """Returns memory for the dense weights of the largest piece, which is the first."""
    return like.new_empty(pieces_S[0][0].rows.stop, cols)


def _first_rows(scratch: Tensor, rows: slice) -> Tensor:
    """Returns as many rows of the scratch as the piece has."""
    num_rows = rows.stop - rows.start
    return scratch if num_rows == scratch.shape[0] else scratch[:num_rows]


def _columns(tokens: Tensor, rows: slice) -> Tensor:
    """Returns the columns of the tokens that belong to these rows of the weight."""
    return tokens if rows.stop - rows.start == tokens.shape[1] else tokens[:, rows]
