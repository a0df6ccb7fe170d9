"""Provides compact weights of any size for the kernels of the CPU. The dense side follows the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smet_compile.format import Layout, Topology
from tests.ops.matmul_cases import make_mask
from tests.support.blocks import Grid


@dataclass(frozen=True)
class Weight:
    """Holds a weight both ways: ``dense`` (S, R, C) in fp64, and the topology that kernels take."""

    grid: Grid
    mask: Tensor
    dense: Tensor
    topology: Topology

    @property
    def layout(self) -> Layout:
        return self.topology.layout

    def values(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.gather(self.dense).to(dtype)

    def gather(self, dense: Tensor) -> Tensor:
        """Returns the active blocks of a product, as the op should give them."""
        return self.grid.gather(dense.reshape(self.grid.shape), self.mask)

    def tokens(self, num_tokens: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draws (T, size), or (S, T, size) for a stack."""
        num_matrices = self.dense.shape[0]
        leading = (num_matrices,) if num_matrices > 1 else ()
        return torch.randn(*leading, num_tokens, size, dtype=torch.float64).to(dtype)


def weight(
    size: tuple[int, ...], block_shape: tuple[int, int], mask_kind: str = "random", flatten: bool = False
) -> Weight:
    grid = Grid(size, block_shape, flatten)
    mask = make_mask(mask_kind, grid)
    dense = torch.randn(size, dtype=torch.float64).bfloat16().double() * grid.spread(mask)
    topology = Topology.from_mask(mask, Layout.of(size, block_shape, flatten))
    return Weight(grid, mask, dense.reshape(grid.matrix), topology)
