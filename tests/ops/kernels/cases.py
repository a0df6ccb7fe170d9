"""Compact weights for kernels: like those of ``matmul_cases``, of any size, where the kernels run."""

from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import CompactWeight
from tests.ops.kernels.device import DEVICE
from tests.ops.matmul_cases import Case, make_mask
from tests.support.blocks import Grid


def weight(size: tuple[int, ...], block_shape: tuple[int, int], mask_kind: str = "random") -> Case:
    grid = Grid(size, block_shape)
    mask = make_mask(mask_kind, grid)
    dense = torch.randn(size, dtype=torch.float64).bfloat16().double() * grid.spread(mask)
    compact = CompactWeight(Layout.of(size, block_shape), mask, int(mask.sum()))
    return Case(grid, mask, dense.reshape(grid.matrix), compact)


def topology(each: Case) -> tuple[Any, ...]:
    """The topology, the index and the layout, as the ops take them. The lists of the index begin anywhere."""
    lists = each.compact.lists
    unaligned = torch.empty(lists.numel() + 1, dtype=lists.dtype, device=DEVICE)[1:].copy_(lists)
    return each.compact.topology.to(DEVICE), [unaligned], *each.compact.op_layout()


def tokens(each: Case, num_tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """(T, size), or (S, T, size) for a stack; numbers that every dtype holds."""
    return each.tokens(num_tokens, size, torch.bfloat16).to(DEVICE, dtype)


def values(each: Case, dtype: torch.dtype) -> Tensor:
    return each.values(dtype).to(DEVICE)
