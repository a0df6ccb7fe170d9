"""Draws inactive blocks at random, exactly k of them: any of them, or such that rows and columns fill evenly.

Shape suffixes: S matrices of the stack, M and K rows and columns of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.format.layout import Layout
from smet_compile.format.topology import positions_of


def sample_positions(taken: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws ``count`` distinct positions, uniformly from those where ``taken`` (num_blocks,) bool is false.

    The CPU draws them, so that a run is the same on every device. The caller makes sure that enough are free.
    """
    free = taken.numel() - int(taken.count_nonzero())
    assert count <= free
    if 4 * count > free:
        chosen = torch.randperm(free, generator=generator)[:count].to(taken.device)
        return positions_of(~taken)[chosen]
    # Few among many: draw with replacement, drop repeats and taken ones, until there are enough.
    is_drawn, drawn = torch.zeros_like(taken), positions_of(taken[:0])
    while drawn.numel() < count:
        tries = 2 * (count - drawn.numel()) * taken.numel() // free + 8
        fresh = torch.randint(taken.numel(), (tries,), generator=generator).to(taken.device)
        is_drawn.index_fill_(0, fresh, True)
        drawn = positions_of(is_drawn.logical_and_(~taken))
    return drawn[torch.randperm(drawn.numel(), generator=generator)[:count].to(taken.device)]


def sample_evenly(active: Tensor, taken: Tensor, layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    """Draws ``count`` distinct positions where ``taken`` is false, in the emptiest rows and columns of blocks.

    A row of tiles without an active tile is a band of dead units, and a small grid drawn uniformly has many: of 4 x 4
    tiles at density 0.25 every fourth row is empty. Here the counts of all rows differ by at most one, and so do those
    of all columns, as far as the positions that are taken allow. The CPU draws.

    Args:
        active: (num_blocks,) bool, the blocks that rows and columns hold already.
        taken: (num_blocks,) bool, the blocks that must not be drawn: the active ones, and possibly more.
    """
    held, free = (blocks.view(-1, layout.block_cols).sum(1).cpu() for blocks in (active, ~taken))
    return sample_rows(active, taken, layout, even_shares(held, free, count, generator), generator)


def sample_rows(active: Tensor, taken: Tensor, layout: Layout, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Draws as many positions of each row of blocks as is ``wanted`` (S * M,), in the emptiest columns of blocks.

    ``active`` and ``taken`` are as for ``sample_evenly``. No more may be wanted of a row than it has free.
    """
    grid = (layout.num_matrices, layout.block_rows, layout.block_cols)
    active_SMK, taken_SMK, wanted_SM = active.cpu().view(grid), taken.cpu().view(grid), wanted.cpu().view(grid[:2])
    filled_SK = active_SMK.sum(1).double()
    drawn_SMK = torch.zeros(grid, dtype=torch.bool)
    for row in torch.randperm(grid[1], generator=generator).tolist():
        chance_SK = torch.rand(filled_SK.shape, dtype=torch.float64, generator=generator)
        order_SK = (filled_SK + chance_SK).masked_fill(taken_SMK[:, row], torch.inf).argsort(-1)
        first_SK = torch.arange(grid[2]) < wanted_SM[:, row, None]
        drawn_SMK[:, row].scatter_(-1, order_SK, first_SK)
        filled_SK += drawn_SMK[:, row]
    return positions_of(drawn_SMK.flatten()).to(active.device)


def even_shares(held: Tensor, free: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Shares ``count`` among the lines as water fills a vessel: the emptiest first, none more than is ``free``."""
    low, high = 0, int((held + free).max())
    while low < high:  # the highest level that count suffices for
        level = (low + high + 1) // 2
        needed = int((level - held).clamp(min=0).minimum(free).sum())
        low, high = (level, high) if needed <= count else (low, level - 1)
    shares = (low - held).clamp(min=0).minimum(free)
    rest = count - int(shares.sum())
    open_lines = positions_of((shares < free) & (held + shares <= low))
    more = open_lines[torch.randperm(open_lines.numel(), generator=generator)[:rest]]
    shares[more] += 1
    return shares
