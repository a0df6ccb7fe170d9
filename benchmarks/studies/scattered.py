"""Draws tiles uniformly instead of evenly, as an alternative start to measure against."""

from __future__ import annotations

import torch
from torch import nn

from smet_compile.format import sample_positions
from smet_compile.ops import find_sites


@torch.no_grad()
def scatter(model: nn.Module, seed: int) -> None:
    """Draws the topology of every compact weight anew. The values stay: they are random numbers, wherever they lie."""
    generator = torch.Generator().manual_seed(seed)
    for site in find_sites(model).values():
        empty = torch.zeros(site.layout.num_blocks, dtype=torch.bool)
        mask = empty.clone()
        mask[sample_positions(empty, site.num_active, generator)] = True
        site.compact.set_mask(mask.to(site.values.device))
