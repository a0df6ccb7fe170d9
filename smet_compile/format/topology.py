"""Topology: which blocks are active, as one bit per block. The packed bits are the truth, all else is derived."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _bits_of_byte(device: torch.device) -> Tensor:
    """(256,) int64 on ``device``: eight 0/1 bytes each, so that one gather expands eight blocks."""
    byte = torch.arange(256, device=device)
    bits = (byte[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).squeeze(1)


def unpack_bits(bits: Tensor, num_blocks: int) -> Tensor:
    """Packed bits (ceil(num_blocks / 8),) uint8 → mask (num_blocks,) bool. Bit j of byte i is block 8 i + j."""
    return _bits_of_byte(bits.device).index_select(0, bits.int()).view(torch.bool)[:num_blocks]


def pack_bits(mask: Tensor) -> Tensor:
    """Mask (num_blocks,) bool → packed bits (ceil(num_blocks / 8),) uint8; spare bits are zero."""
    spare = -mask.numel() % 8
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, spare)).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def count_active(bits: Tensor) -> int:
    """Number of active blocks, read from the bits."""
    ones = _bits_of_byte(bits.device).view(torch.uint8).view(256, 8).sum(1, dtype=torch.int64)
    return int((torch.bincount(bits.int(), minlength=256) * ones).sum())


def positions_of(mask: Tensor) -> Tensor:
    """Positions (N,) int64 of the active blocks, row-major."""
    return mask.nonzero().squeeze(1)
