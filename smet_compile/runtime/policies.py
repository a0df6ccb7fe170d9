"""What to drop and what to grow. Each policy answers with positions; the manager does the rest."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from smet_compile.format import block_means, positions_of, sample_evenly, sample_positions
from smet_compile.ops import Site


def drop_smallest(site: Site, mask: Tensor, count: int) -> Tensor:
    """Positions (count,) of the active blocks of least mean |w| (Mocanu et al. 2018)."""
    positions = positions_of(mask)
    scores = block_means(site.values.detach(), positions, site.layout)
    return positions[scores.topk(count, largest=False, sorted=False).indices]


def grow_random(site: Site, mask: Tensor, dropped: Tensor, seed: int, step: int) -> Tensor:
    """Positions, as many as ``dropped`` and none of these, among the inactive blocks: uniform (SET, Mocanu et al.
    2018), or for tiles in the emptiest rows and columns of tiles.

    A function of topology, seed, step and name alone: a resumed run draws what the undisturbed one would have drawn.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {step} {site.name}".encode()))
    if not site.layout.tiles:
        return sample_positions(mask, dropped.numel(), generator)
    kept = mask.clone()
    kept[dropped] = False
    return sample_evenly(kept, mask, site.layout, dropped.numel(), generator)
