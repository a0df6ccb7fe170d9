"""Blocks of a dense weight, written from the specification alone: S matrices (R, C) cut into (bm, bn) blocks.

Nothing here imports the library. A per-block tensor is row-major over (S, M, K).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    shape: tuple[int, ...]
    block_shape: tuple[int, int]
    flatten: bool = False

    @property
    def matrix(self) -> tuple[int, int, int]:
        if self.flatten:
            return 1, self.shape[0], math.prod(self.shape[1:])
        return math.prod(self.shape[:-2]), self.shape[-2], self.shape[-1]

    @property
    def counts(self) -> tuple[int, int, int]:
        S, R, C = self.matrix
        bm, bn = self.block_shape
        return S, math.ceil(R / bm), math.ceil(C / bn)

    @property
    def num_blocks(self) -> int:
        return math.prod(self.counts)

    def spread(self, per_block: Tensor) -> Tensor:
        """Gives every weight the number of its block, and cuts off what hangs over the edge."""
        _, R, C = self.matrix
        bm, bn = self.block_shape
        tiled = per_block.reshape(self.counts).repeat_interleave(bm, 1).repeat_interleave(bn, 2)
        return tiled[:, :R, :C].reshape(self.shape)

    def tiles(self, dense: Tensor) -> Tensor:
        """Returns (num_blocks, bm, bn), zero where a block hangs over the edge."""
        S, R, C = self.matrix
        _, M, K = self.counts
        bm, bn = self.block_shape
        padded = F.pad(dense.reshape(S, R, C), (0, K * bn - C, 0, M * bm - R))
        return padded.reshape(S, M, bm, K, bn).transpose(2, 3).reshape(-1, bm, bn)

    def mean(self, dense: Tensor) -> Tensor:
        """Returns the mean of each block over its entries inside the matrix."""
        return self.tiles(dense).sum((1, 2)) / self.tiles(torch.ones_like(dense)).sum((1, 2))

    def gather(self, dense: Tensor, mask: Tensor) -> Tensor:
        """Returns the active blocks in row-major order: (N, bm, bn), or (N,) for single weights."""
        values = self.tiles(dense)[mask]
        return values.reshape(-1) if self.block_shape == (1, 1) else values


def round_half_up(number: float) -> int:
    return math.floor(number + 0.5)
