"""Codes hold a moment in one byte: a float of 8 bits relative to the largest magnitude of its group.

A code's magnitude c > 0 stands for ``scale`` times the fp32 number whose upper bits are c + offset (3 bits of
mantissa, the exponent above), c = 0 for zero; the largest c is ``scale`` itself. It is part of the law.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format import WEIGHTS_OF_A_GROUP, Layout

_DISCARDED = 20
"""Bits of an fp32 number that its code has no place for."""
_FRACTION = (1 << _DISCARDED) - 1
_HALF = 1 << (_DISCARDED - 1)


class CodeFormat(NamedTuple):
    """Says how a magnitude relative to the largest becomes a code of ``0 ... largest``, signed or not."""

    offset: int
    largest: int
    signed: bool

    @property
    def smallest(self) -> float:
        """Returns the smallest number above zero, relative to the scale."""
        return torch.tensor((1 + self.offset) << _DISCARDED, dtype=torch.int32).view(torch.float32).item()


SIGNED_CODES = CodeFormat(889, 127, signed=True)
"""One sign, four bits of exponent, three of mantissa: down to 2^-16 of the largest, and then zero."""
UNSIGNED_CODES = CodeFormat(761, 255, signed=False)
"""Five bits of exponent, three of mantissa: down to 2^-32 of the largest, the square of the range of a signed code."""


def num_scales(num_weights: int, layout: Layout | None) -> int:
    """Counts the groups of a compact weight of this layout, or of a plain parameter: 1024 entries each."""
    return layout.num_groups if layout else -(-num_weights // WEIGHTS_OF_A_GROUP)


def decode(codes: Tensor, scales: Tensor, kind: CodeFormat) -> Tensor:
    """Turns uint8 codes into fp32; ``scales`` broadcasts over them."""
    magnitude = codes.int() & kind.largest
    size = ((magnitude + kind.offset) << _DISCARDED).view(torch.float32)
    size = torch.where(magnitude > 0, scales * size, 0.0)
    return torch.where(codes > kind.largest, -size, size) if kind.signed else size


def encode(moment: Tensor, scales: Tensor, kind: CodeFormat, noise: Tensor | None) -> Tensor:
    """Turns fp32 into uint8 codes; ``scales`` is the largest magnitude of each one's group, 0 where all are zero.

    Up with the probability of the discarded fraction, by the low 20 bits of ``noise``; None: to nearest. Below the
    smallest code a signed moment is rounded to that or to zero in the same way; one without a sign (a mean of
    squares, by whose root another is divided) goes up, and only zero itself is 0.
    """
    fraction = None if noise is None else (noise & _FRACTION).int()
    ratio = torch.where(scales > 0, moment.abs() / scales, 0.0)
    bits = ratio.view(torch.int32)
    magnitude = ((bits + (_HALF if fraction is None else fraction)) >> _DISCARDED) - kind.offset
    magnitude = magnitude.clamp(max=kind.largest)
    if not kind.signed:
        return torch.maximum(magnitude, (moment > 0).int()).to(torch.uint8)
    below = bits < (1 + kind.offset) << _DISCARDED
    magnitude = torch.where(below, _one_or_zero(ratio, kind.smallest, fraction), magnitude)
    return torch.where(moment < 0, magnitude + kind.largest + 1, magnitude).to(torch.uint8)


def _one_or_zero(ratio: Tensor, smallest: float, fraction: Tensor | None) -> Tensor:
    """Returns 1 with the probability ratio / smallest, else 0; to nearest: 1 from a half on."""
    if fraction is None:
        return (ratio >= smallest / 2).int()
    divisor = ratio.new_full((1,), smallest)  # by a number, a GPU would multiply with the inverse
    return (fraction < ratio / divisor * (_FRACTION + 1)).int()


class Groups(NamedTuple):
    """Holds the groups that the blocks of some rows lie in.

    Args:
        numbers: (g,) int64, which of the scales are theirs.
        of_block: int64, where in ``numbers`` the group of each block is; broadcasts over the rows.
    """

    numbers: Tensor
    of_block: Tensor

    def spread(self, per_group: Tensor) -> Tensor:
        return per_group[self.of_block]

    def largest(self, entries: Tensor) -> Tensor:
        """Returns (g,) the largest of each group's entries, none of them negative; 0 where it has none."""
        per_block = entries if entries.shape == self.of_block.shape else entries.amax((1, 2))
        zeros = torch.zeros_like(self.numbers, dtype=entries.dtype)
        return zeros.scatter_reduce_(0, self.of_block.reshape(-1), per_block.reshape(-1), "amax")
