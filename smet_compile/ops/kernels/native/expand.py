"""unpack and pack on the CPU, for every kind of block: each dense weight is written once, or read once."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from smet_compile.format import Layout, split_index, whole_index
from smet_compile.ops.kernels.native.build import library

_SIZES = (2, 4, 8)


class _Weights(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bits", "index", "values", "dense")),
        *((name, ctypes.c_int64) for name in ("first", "last", "num_active", "block_rows", "block_cols", "bm", "bn")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "element_bytes", "wide_index", "num_threads")),
    ]


def moves(dtype: torch.dtype) -> bool:
    """Whether weights of ``dtype`` can be moved by these kernels on this machine."""
    return dtype.is_floating_point and dtype.itemsize in _SIZES and library("expand") is not None


def unpack(
    values: Tensor, topology: Tensor, index: list[Tensor], shape: list[int], matrix: list[int], block_shape: list[int]
) -> Tensor:
    """The dense weight of ``values``, new and contiguous."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    dense = values.new_empty(shape)
    unpack_rows(dense, values, topology, index, layout, slice(0, layout.num_matrices * layout.rows))
    return dense


def pack(
    dense: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
) -> Tensor:
    """The active blocks of ``dense``, what hangs over an edge zero."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    values = dense.new_empty(layout.values_shape(num_active))
    pack_rows(values, dense, topology, index, layout, slice(0, layout.num_matrices * layout.rows))
    return values


def unpack_rows(
    dense_rows: Tensor, values: Tensor, topology: Tensor, index: list[Tensor], layout: Layout, rows: slice
) -> None:
    """Writes some rows of the dense weight, counted through all matrices."""
    _move("unpack", values.contiguous(), dense_rows, topology, index, layout, rows)


def pack_rows(
    values: Tensor, dense_rows: Tensor, topology: Tensor, index: list[Tensor], layout: Layout, rows: slice
) -> None:
    """Writes to ``values`` what is active in some rows (counted through all matrices), given those rows alone."""
    _move("pack", values, dense_rows.contiguous(), topology, index, layout, rows)


def _move(
    name: str, values: Tensor, dense: Tensor, topology: Tensor, index: list[Tensor], layout: Layout, rows: slice
) -> None:
    whole = whole_index(index, topology, layout, values.shape[0])
    lists = split_index(whole, layout, values.shape[0])
    wanted = lists.group_starts if layout.single_weights else lists.positions
    assert wanted is not None and values.is_contiguous() and dense.is_contiguous()
    width = layout.cols if layout.single_weights else 1
    job = _Weights(
        bits=topology.data_ptr(),
        index=wanted.data_ptr(),
        values=values.data_ptr(),
        dense=dense.data_ptr(),
        first=rows.start * width,
        last=rows.stop * width,
        num_active=values.shape[0],
        block_rows=layout.block_rows,
        block_cols=layout.block_cols,
        bm=layout.block_shape[0],
        bn=layout.block_shape[1],
        rows=layout.rows,
        cols=layout.cols,
        element_bytes=values.element_size(),
        wide_index=wanted.dtype == torch.int64,
        num_threads=torch.get_num_threads(),
    )
    lib = library("expand")
    assert lib is not None, "chosen only where it compiled"
    getattr(lib, name)(ctypes.byref(job))
