"""Which tokens a program takes: a block of a group of tokens, or a split of a sum over them."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_of_tokens(offsets, number, num_tokens, NUM_GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK_T: tl.constexpr):
    """Matrix, first token and end of block ``number`` of tokens that are sorted by matrix, as ``offsets`` (S,) say.

    Each group is cut into blocks for itself. Tokens past the last offset are the group of matrix S, which there is not.
    """
    group = tl.arange(0, LANES)
    end = tl.load(offsets + group, mask=group < NUM_GROUPS, other=num_tokens)
    begin = tl.load(offsets + group - 1, mask=(group > 0) & (group <= NUM_GROUPS), other=0)
    begin = tl.where(group > NUM_GROUPS, num_tokens, begin)
    num_blocks = (end - begin + BLOCK_T - 1) // BLOCK_T
    blocks_until = tl.cumsum(num_blocks, 0)
    mine = (blocks_until - num_blocks <= number) & (number < blocks_until)
    matrix = tl.sum(tl.where(mine, group, 0))
    within = number - tl.sum(tl.where(mine, blocks_until - num_blocks, 0))
    first = tl.sum(tl.where(mine, begin, 0)) + within * BLOCK_T
    return matrix, first, tl.sum(tl.where(mine, end, 0))


@triton.jit
def tokens_of_split(offsets, matrix, num_tokens, split, num_splits, BLOCK_T: tl.constexpr):
    """First and last token of a split of the tokens of a matrix: all ``num_tokens``, or its group's of ``offsets``."""
    begin = 0
    end = num_tokens
    if offsets is not None:
        end = tl.load(offsets + matrix)
        begin = tl.load(offsets + matrix - 1, mask=matrix > 0, other=0)
    share = tl.cdiv(tl.cdiv(end - begin, num_splits), BLOCK_T) * BLOCK_T
    first = begin + split * share
    return first, tl.minimum(first + share, end)
