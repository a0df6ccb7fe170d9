"""Says how fast products of tiles are assumed to be on a GPU. The choice of kernels and the planner read it."""

from __future__ import annotations

import torch

from smet_compile.format import Layout

_BY_SIDE = {128: 0.55, 64: 0.40, 32: 0.20, 16: 0.10}
"""Holds speeds by the narrower side of a tile, from arithmetic for Hopper: reads from L2 bound the products."""
_WITHOUT_TENSOR_CORES = 0.5
"""A guess for fp32: arithmetic bounds both products, and the vendor's is the better one."""


def tile_speed(dtype: torch.dtype, layout: Layout) -> float | None:
    """Returns the speed of products of tiles per active operation over that of a dense product.

    It is None for blocks that no kernel multiplies as tiles, narrower than 16. No card has confirmed it yet.
    """
    side = max((known for known in _BY_SIDE if known <= min(layout.block_shape)), default=None)
    if side is None:
        return None
    return _BY_SIDE[side] if dtype.itemsize == 2 else _WITHOUT_TENSOR_CORES
