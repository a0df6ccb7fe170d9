"""Lays out operands so that Triton's kernels copy them 16 bytes at a time.

A copy to shared memory that no thread waits for moves 4, 8 or 16 bytes from an address that is a multiple of that. Rows
of 5461 numbers in bf16 begin at multiples of 2 bytes: the compiler then loads 2 bytes at a time through registers. Such
an operand is copied once before the launch, to rows that end with the last block, zero beyond the edge. The copy reads
and writes the operand once; a product reads it again for every line of blocks.

Results are not padded: they are written once, and whoever reads them expects the published shape.
"""

from __future__ import annotations

from torch import Tensor

VECTOR_BYTES = 16
_MOST_TOKENS = 256
"""No program takes more at a time."""


def whole_columns(columns: int, width: int) -> int:
    """Returns the columns of all blocks of ``width``, with what hangs over the edge."""
    return -(-columns // width) * width


def needs_copy(operand: Tensor, width: int) -> bool:
    """Tells whether rows of ``operand``, read in blocks of ``width`` columns, are not aligned but would be if copied.

    Blocks that begin at any byte, since their width is no multiple of 16 bytes, are aligned nowhere.
    """
    vector = VECTOR_BYTES // operand.element_size()
    if width % vector:
        return False
    *outer, inner = operand.stride()
    is_aligned = inner == 1 and operand.shape[-1] % vector == 0 and operand.data_ptr() % VECTOR_BYTES == 0
    return not is_aligned or any(stride % vector for stride in outer)


def is_far(operand: Tensor) -> bool:
    """Tells whether offsets within the part of an operand that a program reads at a time do not fit into 32 bits."""
    return operand.shape[-1] * operand.stride(-1) + _MOST_TOKENS * operand.stride(-2) >= 2**31


def copy_to_blocks(operand: Tensor, width: int) -> Tensor:
    """Returns a contiguous copy whose rows end with the last block of ``width`` columns: zeros beyond the edge."""
    columns = operand.shape[-1]
    whole = whole_columns(columns, width)
    copied = operand.new_empty(*operand.shape[:-1], whole)
    copied[..., :columns].copy_(operand.detach())
    if whole != columns:
        copied[..., columns:].zero_()
    return copied
