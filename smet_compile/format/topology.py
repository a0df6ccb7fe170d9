"""Topology: which blocks are active, as one bit per block. The packed bits are the truth, all else is derived."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS_TO_TOP_BYTE = sum(1 << (56 - 7 * bit) for bit in range(8))
"""Times this, bit 8 j of a number goes to bit 56 + j."""


_cached_bits: dict[torch.device, Tensor] = {}


def _bits_of_byte(device: torch.device) -> Tensor:
    """(256,) int64 on ``device``: eight 0/1 bytes each, so that one gather expands eight blocks."""
    if device not in _cached_bits:
        bits = _make_bits(device)
        if type(bits) is not Tensor:  # it only stands for a tensor, while something is traced
            return bits
        _cached_bits[device] = bits
    return _cached_bits[device]


def _make_bits(device: torch.device) -> Tensor:
    byte = torch.arange(256, device=device)
    bits = (byte[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).squeeze(1)


def unpack_bits(bits: Tensor, num_blocks: int) -> Tensor:
    """Packed bits (ceil(num_blocks / 8),) uint8 → mask (num_blocks,) bool. Bit j of byte i is block 8 i + j."""
    return _bits_of_byte(bits.device).index_select(0, bits.int()).view(torch.bool)[:num_blocks]


def pack_bits(mask: Tensor) -> Tensor:
    """Mask (num_blocks,) bool → packed bits (ceil(num_blocks / 8),) uint8; spare bits are zero."""
    eight = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(torch.int64)
    return (eight * _BITS_TO_TOP_BYTE >> 56).to(torch.uint8)  # eight bytes of 0 or 1, read as one number


def count_active(bits: Tensor) -> int:
    """Number of active blocks, read from the bits."""
    ones = _bits_of_byte(bits.device).view(torch.uint8).view(256, 8).sum(1, dtype=torch.int64)
    return int((torch.bincount(bits.int(), minlength=256) * ones).sum())


def positions_of(mask: Tensor) -> Tensor:
    """Positions (N,) int64 of the active blocks, row-major."""
    return mask.nonzero().squeeze(1)
