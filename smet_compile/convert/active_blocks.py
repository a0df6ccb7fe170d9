"""Chooses which blocks of a weight start active."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from smet_compile.format import Band, Layout, all_block_means, bands_of, patterns
from smet_compile.format.arguments import described

Select = Literal["random", "magnitude", "nonzero"]
SELECTS: tuple[str, ...] = get_args(Select)
FROM_MASKS = "masks"
"""Stands in the place of a way to select blocks where masks gave them."""
NUM_NAMED = 3
"""How many weights a warning names."""


@dataclass(frozen=True)
class Start:
    """Says how the first active blocks of the weight ``name`` are chosen.

    Each weight, or slab of one, is drawn from a generator of its own, which follows from ``seed``, name and number.
    """

    name: str
    layout: Layout
    num_active: int
    select: str
    pattern: str | None
    seed: int


def select_blocks(start: Start, dense: Tensor) -> Tensor:
    """Returns the mask (num_blocks,) of the blocks of ``dense`` that start active; none on the meta device."""
    layout = start.layout
    mask = torch.zeros(layout.num_blocks, dtype=torch.bool, device=dense.device)
    if dense.is_meta:
        return mask
    if start.select == "nonzero":
        return nonzero_blocks(dense, layout)
    means = all_block_means(dense, layout) if start.select == "magnitude" else None
    for band in bands_of(layout):
        mask[band.place(_select_in_band(start, band, means).to(dense.device))] = True
    return mask


def _select_in_band(start: Start, band: Band, means: Tensor | None) -> Tensor:
    """Returns the positions of the first active blocks of one slab, those of largest ``means`` where these are given.

    The means are those of all blocks of the weight.
    """
    num_active = start.num_active // start.layout.num_slabs
    if means is not None:
        return patterns.select_largest(band.cut(means), start.pattern, band.layout, num_active)
    text = f"{start.seed} {start.name}" + ("" if band.key is None else f" {band.key}")
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    return patterns.sample(start.pattern, band.layout, num_active, generator)


def nonzero_blocks(dense: Tensor, layout: Layout) -> Tensor:
    """Returns the mask of the blocks with an entry other than zero; of the first block where there is none."""
    mask = all_block_means(dense.detach() != 0, layout) > 0
    if not mask.any():
        mask[0] = True
    return mask


def count_nonzero_blocks(name: str, dense: Tensor, layout: Layout) -> int:
    """Returns how many blocks ``select="nonzero"`` keeps. Raises ValueError for a weight without data."""
    if dense.is_meta:
        raise ValueError(
            f'{name}: expected a weight with data for select="nonzero", got one on the meta device; load the pruned '
            "weights first"
        )
    return int(nonzero_blocks(dense, layout).sum())


def check_no_density_for_nonzero(density: Any, rules: Any, distribution: Any, masks: Any) -> None:
    """Raises ValueError where an argument asks for a density beside ``select="nonzero"``."""
    for argument, got, default in (
        ("density", density, None),
        ("rules", rules, None),
        ("distribution", distribution, "uniform"),
        ("masks", masks, None),
    ):
        if got is not default and got != default:
            raise ValueError(
                f'{argument}: expected none with select="nonzero", which takes the density of each weight from its '
                f"zeros, got {described(got)}; leave it out"
            )


def describe_empty_rows(weights: Iterable[tuple[str, Layout, int]]) -> str:
    """Returns a warning that names the weights with too few blocks for their rows or columns; empty where none has.

    Args:
        weights: (name, layout, number of active blocks) of each weight.
    """
    few = []
    for name, layout, count in weights:
        rows, cols = (layout.num_matrices * n for n in (layout.block_rows, layout.block_cols))
        if count < max(rows, cols):
            few.append(f"{name} ({count:,} blocks for {rows:,} rows and {cols:,} columns of blocks)")
    if not few:
        return ""
    others = f" and {len(few) - NUM_NAMED} more" if len(few) > NUM_NAMED else ""
    return (
        f"{', '.join(few[:NUM_NAMED])}{others}: some outputs or inputs have no weight at all; take smaller blocks or a "
        "higher density"
    )
