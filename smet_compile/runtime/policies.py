"""What to drop and what to grow. Each policy answers with positions; the manager does the rest."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from smet_compile.format import block_means, positions_of, sample_positions
from smet_compile.ops import Site


def drop_smallest(site: Site, mask: Tensor, count: int) -> Tensor:
    """Positions (count,) of the active blocks of least mean |w| (Mocanu et al. 2018)."""
    positions = positions_of(mask)
    scores = block_means(site.values.detach(), positions, site.layout)
    return positions[scores.topk(count, largest=False, sorted=False).indices]


def grow_random(site: Site, mask: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Positions (count,), uniform among the inactive blocks (SET, Mocanu et al. 2018).

    A function of seed, step and name alone: a resumed run draws what the undisturbed one would have drawn.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {step} {site.name}".encode()))
    return sample_positions(mask, count, generator)
