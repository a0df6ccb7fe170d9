"""Draws inactive blocks at random, exactly k of them, without a list of all."""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.format.topology import positions_of


def sample_positions(taken: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` distinct positions, uniform among those where ``taken`` (num_blocks,) bool is false.

    Drawn on the CPU, so that a run is the same on every device. Raises no error: the caller makes sure that
    enough are free.
    """
    free = int(taken.numel() - taken.sum())
    assert count <= free
    if 4 * count > free:
        chosen = torch.randperm(free, generator=generator)[:count].to(taken.device)
        return positions_of(~taken)[chosen]
    # Few among many: draw with replacement, drop repeats and taken ones, until there are enough.
    is_drawn, drawn = torch.zeros_like(taken), positions_of(taken[:0])
    while drawn.numel() < count:
        tries = 2 * (count - drawn.numel()) * taken.numel() // free + 8
        fresh = torch.randint(taken.numel(), (tries,), generator=generator).to(taken.device)
        is_drawn[fresh] = True
        drawn = positions_of(is_drawn.logical_and_(~taken))
    return drawn[torch.randperm(drawn.numel(), generator=generator)[:count].to(taken.device)]
