"""Provides compact weights for products, of awkward sizes and masks. The dense side follows the specification."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import CompactWeight
from tests.support.blocks import Grid

SHAPES = {
    "ragged": ((37, 29), False),
    "fitting": ((32, 48), False),
    "one_of_a_stack": ((1, 37, 29), False),
    "convolution": ((19, 5, 7), True),
    "stack": ((3, 21, 29), False),
}
BLOCK_SHAPES = [(1, 1), (1, 8), (8, 1), (8, 8), (16, 8), (3, 2)]
TILES = [shape for shape in BLOCK_SHAPES if min(shape) > 1]
MASKS = ["random", "one", "all", "gaps"]


@dataclass(frozen=True)
class Case:
    """Holds a weight as ``dense`` (S, R, C) in fp64, and as the arguments of the ops."""

    grid: Grid
    mask: Tensor
    dense: Tensor
    compact: CompactWeight

    @property
    def topology(self) -> tuple[Any, ...]:
        return self.compact.topology, self.compact.lists, self.compact.layout.text

    def values(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.grid.gather(self.dense.view(self.grid.shape), self.mask).to(dtype)

    def gather(self, dense_SRC: Tensor) -> Tensor:
        """Returns the active blocks of a product, as the op should."""
        return self.grid.gather(dense_SRC.reshape(self.grid.shape), self.mask)

    def tokens(self, num_tokens: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draws (T, size), or (S, T, size) for a stack."""
        num_matrices = self.dense.shape[0]
        leading = (num_matrices,) if num_matrices > 1 else ()
        return torch.randn(*leading, num_tokens, size, dtype=torch.float64).to(dtype)


def make_mask(kind: str, grid: Grid) -> Tensor:
    mask = torch.zeros(grid.counts, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(grid.counts) < 0.4
    elif kind == "all":
        mask[:] = True
    elif kind == "gaps":
        # Whole block rows, block columns and (of a stack) matrices without an active block.
        mask[-1, 1::2, 1::3] = True
    if kind != "none":
        mask[-1, -1, -1] |= not mask.any()
    return mask.flatten()


def case(shape: str, block_shape: tuple[int, int], mask_kind: str = "random") -> Case:
    size, flatten = SHAPES[shape]
    grid = Grid(size, block_shape, flatten)
    mask = make_mask(mask_kind, grid)
    dense = torch.randn(size, dtype=torch.float64).bfloat16().double() * grid.spread(mask)
    compact = CompactWeight(Layout.of(size, block_shape, flatten), mask, int(mask.sum()))
    return Case(grid, mask, dense.reshape(grid.matrix), compact)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the root mean square of the difference, relative to that of the expected tensor."""
    return float((actual.double() - expected).norm() / expected.norm())
