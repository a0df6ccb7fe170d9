"""Sizes of what a program works on, warps and pipeline stages: by device, arithmetic and side of a tile.

The numbers follow from shared memory (227 KiB of a multiprocessor on Hopper, 163 KiB on Ampere), from 255 registers a
thread, and from reuse: a step of a product (a, k) by (k, c) reads k (a + c) numbers for k a c multiply-adds, so narrow
tiles are taken with many tokens, or several at once. A configuration depends on shapes and on the kind of device
alone, never on a timing: a run can be repeated bit by bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

WIDEST = 128
"""Wider blocks are taken in parts."""
NARROWEST = 16
"""What a product on tensor cores takes at least; narrower blocks are padded."""
_FEWEST_LANES = 8


class Masked(NamedTuple):
    """A step of masked_matmul: ``tokens`` of them by ``inner`` weights of each output."""

    tokens: int
    inner: int
    num_warps: int
    num_stages: int


class Sampled(NamedTuple):
    """A step of sampled_matmul: ``tokens`` of them, for one block row by ``columns``, of several tiles if narrow."""

    columns: int
    tokens: int
    num_warps: int
    num_stages: int


_MASKED = {
    ("hopper", "half", 32): Masked(256, 64, 8, 3),
    ("hopper", "half", 64): Masked(256, 32, 8, 4),
    ("hopper", "half", 128): Masked(256, 64, 8, 4),
    ("hopper", "tf32", 32): Masked(128, 32, 4, 4),
    ("hopper", "tf32", 64): Masked(128, 32, 4, 4),
    ("hopper", "tf32", 128): Masked(128, 32, 8, 4),
    ("ampere", "half", 32): Masked(128, 64, 4, 4),
    ("ampere", "half", 64): Masked(128, 64, 4, 4),
    ("ampere", "half", 128): Masked(128, 32, 4, 4),
    ("ampere", "tf32", 32): Masked(128, 32, 4, 4),
    ("ampere", "tf32", 64): Masked(128, 32, 4, 3),
    ("ampere", "tf32", 128): Masked(128, 32, 8, 3),
}
_MASKED_WITHOUT_TENSOR_CORES = Masked(64, 16, 8, 3)
_SAMPLED = {
    ("hopper", "half", 32): Sampled(256, 64, 8, 3),
    ("hopper", "half", 64): Sampled(256, 32, 8, 4),
    ("hopper", "half", 128): Sampled(128, 64, 8, 3),
    ("hopper", "tf32", 32): Sampled(128, 32, 4, 4),
    ("hopper", "tf32", 64): Sampled(128, 32, 4, 4),
    ("hopper", "tf32", 128): Sampled(128, 32, 8, 4),
    ("ampere", "half", 32): Sampled(128, 64, 4, 3),
    ("ampere", "half", 64): Sampled(128, 64, 4, 3),
    ("ampere", "half", 128): Sampled(128, 32, 8, 4),
    ("ampere", "tf32", 32): Sampled(128, 32, 4, 3),
    ("ampere", "tf32", 64): Sampled(128, 32, 4, 3),
    ("ampere", "tf32", 128): Sampled(128, 32, 8, 3),
}
_SAMPLED_WITHOUT_TENSOR_CORES = Sampled(64, 16, 8, 3)
_MASKED_INTERPRETED = Masked(64, 32, 4, 1)
_SAMPLED_INTERPRETED = Sampled(32, 64, 4, 1)


def lanes(width: int) -> int:
    """Lanes of a program for a block of ``width``: a power of two, from ``NARROWEST`` to ``WIDEST``."""
    return min(WIDEST, max(NARROWEST, 1 << (width - 1).bit_length()))


def _row(architecture: str, dtype: torch.dtype, precision: str, width: int) -> tuple[str, str, int]:
    return architecture, "half" if dtype.itemsize == 2 else precision, max(32, lanes(width))


def masked(architecture: str, dtype: torch.dtype, precision: str, width: int) -> Masked:
    """For output blocks of ``width``."""
    if architecture == "interpreter":
        return _MASKED_INTERPRETED
    return _MASKED.get(_row(architecture, dtype, precision, width), _MASKED_WITHOUT_TENSOR_CORES)


def sampled(architecture: str, dtype: torch.dtype, precision: str, width: int) -> Sampled:
    """For blocks of ``width`` columns."""
    if architecture == "interpreter":
        return _SAMPLED_INTERPRETED
    return _SAMPLED.get(_row(architecture, dtype, precision, width), _SAMPLED_WITHOUT_TENSOR_CORES)


def inner_step(width: int, wanted: int) -> tuple[int, int]:
    """Weights of a step along blocks of ``width``, and the lanes a block takes there: a step has a part of one block,
    or several whole ones, padded to a power of two."""
    divisor = math.gcd(width, wanted)
    if divisor == wanted or (width > wanted and divisor >= NARROWEST):
        return divisor, width
    padded = max(_FEWEST_LANES, 1 << (width - 1).bit_length())
    return wanted, padded
