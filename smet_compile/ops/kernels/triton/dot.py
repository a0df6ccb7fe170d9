"""The one product of all kernels, in fp32 sums, and the precision that is asked of it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from smet_compile.ops.kernels.triton.device import INTERPRETED


@triton.jit
def multiply_add(a, b, sum_, PRECISION: tl.constexpr):
    """a b + sum. "ieee": factors as fp32, on plain cores. "tf32": on tensor cores, fp32 factors rounded to tf32."""
    if PRECISION == "ieee":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum_, input_precision=PRECISION)


def dot_precision(dtype: torch.dtype) -> str:
    """``PRECISION`` for factors of ``dtype``: torch's setting decides for fp32. The interpreter has plain cores."""
    on_tensor_cores = dtype.itemsize == 2 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if on_tensor_cores and not INTERPRETED else "ieee"
