"""Packs which blocks are active into one bit per block, and reads it again."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS_TO_TOP_BYTE = sum(1 << (56 - 7 * bit) for bit in range(8))
"""Times this, bit 8 j of a number goes to bit 56 + j."""
_WORDS_AT_ONCE = 2**18
_MIX = -0x61C8864680B583EB
"""An odd number without pattern (2^64 over the golden ratio, as a signed number)."""


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
    """Returns the number of active blocks, read from the bits."""
    return digest_bits(bits)[0]


def spare_bits(bits: Tensor, num_blocks: int) -> int:
    """Returns the bits behind the last block, as a number: 0 in every valid topology."""
    return int(bits[-1]) >> num_blocks % 8 if num_blocks % 8 else 0


def digest_bits(bits: Tensor) -> tuple[int, int]:
    """Returns the number of active blocks and a 64-bit fingerprint of ``bits``, the same on every device.

    Reads each bit once, in pieces of a few megabytes; waits for the device.
    """
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
    totals = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for first in range(0, padded.numel(), _WORDS_AT_ONCE):
        words = padded[first : first + _WORDS_AT_ONCE]
        totals[0] += _ones(words).sum()
        place = torch.arange(first + 1, first + 1 + words.numel(), device=bits.device)
        mixed = (words ^ place * _MIX) * _MIX
        totals[1] += ((mixed ^ mixed >> 29) * _MIX).sum()
    count, fingerprint = totals.tolist()
    return count, fingerprint


def _ones(words: Tensor) -> Tensor:
    """Returns the number of set bits of each int64, added up in ever wider fields (Warren, Hacker's Delight, 5-1)."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words * 0x0101010101010101 >> 56 & 0xFF


def positions_of(mask: Tensor) -> Tensor:
    """Positions (N,) int64 of the active blocks, row-major."""
    return mask.nonzero().squeeze(1)
