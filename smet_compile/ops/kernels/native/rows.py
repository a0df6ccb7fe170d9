"""Implements the kernel named "cpu_rows": multiplies the gradient of each block row by its factor, in C++.

Plain torch repeats the factors for all values first, which takes longer than the product itself.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.choose import Case
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.row_scale import row_factors

_NAMES = {torch.float32: "scale_fp32", torch.float64: "scale_fp64"}


class _Rows(ctypes.Structure):
    """Holds the arguments of the C++ functions, as ``Rows`` in rows.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "factors", "starts", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_threads")),
    ]


class _OfRows(NamedTuple):
    """Holds the factor of each block row, and where its numbers begin among those of all values."""

    factors: Tensor
    starts: Tensor


def refusal(case: Case) -> str | None:
    """Says why the rows of the case cannot be scaled by these functions; None where they can."""
    if case.dtype not in _NAMES:
        return f"does not scale {case.dtype}"
    return "could not be compiled" if library("rows") is None else None


def scale_rows(grad: Tensor, topology: Topology, in_place: bool = False) -> Tensor:
    """Computes what ``ops.law.scale_rows`` does."""
    of_rows: _OfRows = topology.constant(("cpu_rows", grad.dtype), lambda: _prepare(topology, grad.dtype))
    grad = grad.contiguous()
    out = grad if in_place else torch.empty_like(grad)
    job = _Rows(
        grad=grad.data_ptr(),
        factors=of_rows.factors.data_ptr(),
        starts=of_rows.starts.data_ptr(),
        out=out.data_ptr(),
        num_rows=len(of_rows.factors),
        num_threads=torch.get_num_threads(),
    )
    lib = library("rows")
    assert lib is not None, "the kernel is chosen only where it compiled"
    getattr(lib, _NAMES[grad.dtype])(ctypes.byref(job))
    return out


def _prepare(topology: Topology, dtype: torch.dtype) -> _OfRows:
    factors, counts = row_factors(topology)
    block = topology.layout.block_shape[0] * topology.layout.block_shape[1]
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts * block, 0, out=starts[1:])
    return _OfRows(factors.to(dtype), starts)
