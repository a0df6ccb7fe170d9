"""Describes how a weight's shape is cut into matrices and blocks. A layout is static: plain integers, no tensors.

Blocks are of three kinds: single weights (1, 1), tiles (several rows and several columns), and runs (part of one row or
of one column). Kernels and the lists in a ``Topology`` differ by kind.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WEIGHTS_OF_A_GROUP = 1024
"""Number of consecutive dense weights that share the scale of an 8-bit moment, where blocks are not tiles."""


class Slabs(NamedTuple):
    """Says that a matrix consists of slabs, each of which has as many active blocks as every other.

    Args:
        num: how many. dim: 0 for slabs of whole rows, 1 for slabs of whole columns.
        first: the number of the first one in the whole weight, where tensor parallelism left some of them here.
    """

    num: int
    dim: int
    first: int = 0


@dataclass(frozen=True)
class Layout:
    """Reads a dense shape as a stack of S matrices (R, C), each cut into blocks (bm, bn).

    Args:
        shape: shape of the dense weight.
        matrix: (R, C), the shape of each matrix; R * C divides the number of elements.
        block_shape: (bm, bn), the unit of sparsity. The last row and column of blocks may hang over the
            matrix's edge; the entries beyond it are always zero. No block crosses matrices.
        slabs: the slabs that share out the active blocks; None where these may lie anywhere.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, int]
    block_shape: tuple[int, int]
    slabs: Slabs | None = None

    @classmethod
    def of(
        cls, shape: Sequence[int], block_shape: tuple[int, int], flatten: bool = False, slabs: Slabs | None = None
    ) -> Layout:
        """Makes the layout of a weight: its last two dimensions are the matrix, leading ones are stacked.

        ``flatten`` is for convolution weights, whose trailing dimensions become the columns instead.
        """
        shape = tuple(shape)
        matrix = (shape[0], math.prod(shape[1:])) if flatten else (shape[-2], shape[-1])
        return cls(shape, matrix, block_shape, slabs)

    @classmethod
    def from_text(cls, text: str) -> Layout:
        """Makes the layout that ``text`` describes."""
        return _from_text(text)

    @functools.cached_property
    def text(self) -> str:
        """Writes shape, matrix, block shape and slabs as "20x12 20x12 4x4", since an op takes text but no object."""
        parts = self.shape, self.matrix, self.block_shape, self.slabs or ()
        return " ".join("x".join(map(str, numbers)) for numbers in parts if numbers)

    @property
    def rows(self) -> int:
        return self.matrix[0]

    @property
    def cols(self) -> int:
        return self.matrix[1]

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def num_matrices(self) -> int:
        return self.num_weights // (self.rows * self.cols)

    @property
    def block_rows(self) -> int:
        return -(-self.rows // self.block_shape[0])

    @property
    def block_cols(self) -> int:
        return -(-self.cols // self.block_shape[1])

    @property
    def num_blocks(self) -> int:
        """Counts the blocks of all matrices; a block's position counts them row-major, matrix by matrix."""
        return self.num_matrices * self.block_rows * self.block_cols

    @property
    def single_weights(self) -> bool:
        return self.block_shape == (1, 1)

    @property
    def tiles(self) -> bool:
        """Tells whether blocks have several rows and several columns."""
        return min(self.block_shape) > 1

    @property
    def blocks_per_group(self) -> int:
        """Counts the consecutive block positions that share the scale of an 8-bit moment: a tile, else 1024 weights."""
        bm, bn = self.block_shape
        return 1 if self.tiles else max(1, WEIGHTS_OF_A_GROUP // (bm * bn))

    @property
    def num_groups(self) -> int:
        return -(-self.num_blocks // self.blocks_per_group)

    def describe(self, num_active: int, pattern: str | None) -> str:
        """Returns a line on a weight with this number of active blocks, for ``print(model)``."""
        parts = [f"density={num_active / self.num_blocks:.4g}", f"block_shape={self.block_shape}"]
        parts += [f"shape={self.shape}", f"num_active={num_active}"]
        return ", ".join([*parts, *([f"pattern={pattern!r}"] if pattern else [])])

    def values_shape(self, num_active: int) -> tuple[int, ...]:
        """Returns the shape of the compact weight: (N,) for single weights, (N, bm, bn) for larger blocks."""
        return (num_active,) if self.single_weights else (num_active, *self.block_shape)

    def num_active(self, density: float) -> int:
        """Returns the number of blocks that ``density`` keeps, of each slab: rounded half up, at least one."""
        return self.num_slabs * max(1, math.floor(density * (self.num_blocks // self.num_slabs) + 0.5))

    @property
    def num_slabs(self) -> int:
        return 1 if self.slabs is None else self.slabs.num

    def cut(self, dim: int, count: int, slabs: Slabs | None = None) -> Layout:
        """Returns the layout of one of ``count`` equal parts along ``dim``, which consists of ``slabs``."""
        rows, cols = self.matrix
        shape = (rows // count, cols) if dim == 0 else (rows, cols // count)
        return Layout(shape, shape, self.block_shape, slabs)


@functools.lru_cache(maxsize=4096)
def _from_text(text: str) -> Layout:
    shape, matrix, block_shape, *slabs = (tuple(map(int, part.split("x"))) for part in text.split(" "))
    return Layout(shape, (matrix[0], matrix[1]), (block_shape[0], block_shape[1]), Slabs(*slabs[0]) if slabs else None)
