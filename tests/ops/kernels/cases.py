"""Makes compact weights where the kernels run. The dense side is written from the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smet_compile.format import Layout, Topology
from tests.ops.kernels.device import DEVICE
from tests.ops.matmul_cases import make_mask
from tests.support.blocks import Grid


@dataclass(frozen=True)
class Weight:
    """Holds a weight both ways: ``dense`` (S, R, C) in fp64 on the CPU, and its topology on the CPU and the device."""

    grid: Grid
    mask: Tensor
    dense: Tensor
    topology: Topology
    on_device: Topology

    @property
    def layout(self) -> Layout:
        return self.topology.layout

    def exact_values(self) -> Tensor:
        return self.gather(self.dense)

    def values(self, dtype: torch.dtype) -> Tensor:
        return self.exact_values().to(DEVICE, dtype)

    def gather(self, dense: Tensor) -> Tensor:
        """Returns the active blocks of a product, as the op should give them."""
        return self.grid.gather(dense.reshape(self.grid.shape), self.mask)

    def tokens(self, num_tokens: int, size: int, dtype: torch.dtype) -> Tensor:
        """Draws (T, size), or (S, T, size) for a stack; numbers that every dtype holds."""
        num_matrices = self.dense.shape[0]
        leading = (num_matrices,) if num_matrices > 1 else ()
        exact = torch.randn(*leading, num_tokens, size, dtype=torch.float64).to(torch.bfloat16)
        return exact.to(DEVICE, dtype)


def weight(size: tuple[int, ...], block_shape: tuple[int, int], mask_kind: str = "random") -> Weight:
    grid = Grid(size, block_shape)
    mask = make_mask(mask_kind, grid)
    dense = torch.randn(size, dtype=torch.float64).bfloat16().double() * grid.spread(mask)
    topology = Topology.from_mask(mask, Layout.of(size, block_shape))
    return Weight(grid, mask, dense.reshape(grid.matrix), topology, on_device(topology))


def on_device(topology: Topology) -> Topology:
    """Copies a topology; its lists begin anywhere."""
    layout, num_active = topology.layout, topology.num_active
    lists = topology.lists
    unaligned = torch.empty(lists.numel() + 1, dtype=lists.dtype, device=DEVICE)[1:].copy_(lists)
    return Topology(layout, topology.bits.to(DEVICE), unaligned, num_active)
