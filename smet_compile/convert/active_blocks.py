"""Decides how many blocks of each weight are active, and which ones start active."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from smet_compile.format import Layout, all_block_means, sample_evenly, sample_positions

DISTRIBUTIONS = ("uniform", "er", "erk")
SELECTS = ("random", "magnitude", "nonzero")
NUM_NAMED = 3
"""How many weights a warning names."""


def allocate(layouts: dict[str, Layout], density: float, distribution: str) -> dict[str, int]:
    """Returns the number of active blocks of each weight.

    uniform: every weight has ``density``, exactly (rounded half up, at least one block). er, erk: a layer's
    density is in proportion to the sum of its dimensions over their product (Erdős-Rényi, Mocanu et al. 2018;
    its kernel form counts the kernel's dimensions too, Evci et al. 2020); no layer above 1, the total exact.
    """
    if distribution == "uniform":
        return {name: layout.num_active(density) for name, layout in layouts.items()}
    total = math.floor(density * sum(layout.num_blocks for layout in layouts.values()) + 0.5)
    shares = {name: _score(layout, distribution) * layout.num_blocks for name, layout in layouts.items()}
    caps = {name: layout.num_blocks for name, layout in layouts.items()}
    return share_out(max(total, len(layouts)), shares, caps)


def _score(layout: Layout, distribution: str) -> float:
    """Returns the sum over the product of a layer's dimensions: (out, in, kernel...) or (R, C)."""
    convolution = layout.matrix != layout.shape[-2:]
    dims = layout.shape if convolution else layout.matrix
    if distribution == "er":
        dims = dims[:2]
    return sum(dims) / math.prod(dims)


def share_out(total: int, shares: dict[str, float], caps: dict[str, int]) -> dict[str, int]:
    """Splits ``total`` in proportion to ``shares``: each at least 1 and at most its cap, the sum exact.

    The others get what a cap cuts off; the largest remainders get what rounding leaves over.
    """
    amounts = {name: float(caps[name]) for name in caps}
    free = set(caps)
    left = float(total)
    while free:
        scale = left / sum(shares[name] for name in free)
        full = {name for name in free if scale * shares[name] >= caps[name]}
        if not full:
            amounts.update({name: max(1.0, scale * shares[name]) for name in free})
            break
        left -= sum(caps[name] for name in full)
        free -= full
    counts = {name: math.floor(amount) for name, amount in amounts.items()}
    by_remainder = sorted(counts, key=lambda name: (counts[name] - amounts[name], name))
    while (missing := total - sum(counts.values())) != 0:
        unit = 1 if missing > 0 else -1
        movable = [n for n in by_remainder if (counts[n] < caps[n] if unit > 0 else counts[n] > 1)]
        for name in movable[:missing] if unit > 0 else movable[missing:]:
            counts[name] += unit
    return counts


def select_blocks(name: str, dense: Tensor, layout: Layout, num_active: int, select: str, seed: int) -> Tensor:
    """Returns the mask (num_blocks,) of the blocks of the weight ``name`` that start active; none on the meta device.

    Each weight is drawn from a generator of its own, which follows from ``seed`` and the name.
    """
    mask = torch.zeros(layout.num_blocks, dtype=torch.bool, device=dense.device)
    if dense.is_meta:
        return mask
    if select == "nonzero":
        return _nonzero_blocks(dense, layout)
    if select == "magnitude":
        positions = all_block_means(dense, layout).topk(num_active, sorted=False).indices
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if layout.tiles:
            positions = sample_evenly(mask, mask, layout, num_active, generator)
        else:
            positions = sample_positions(mask, num_active, generator)
    mask[positions] = True
    return mask


def _nonzero_blocks(dense: Tensor, layout: Layout) -> Tensor:
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
    return int(_nonzero_blocks(dense, layout).sum())


def check_no_density_for_nonzero(density: float | None, rules: Mapping[str, float] | None, distribution: str) -> None:
    """Raises ValueError where an argument asks for a density beside ``select="nonzero"``."""
    for argument, got, default in (
        ("density", density, None),
        ("rules", rules, None),
        ("distribution", distribution, "uniform"),
    ):
        if got != default:
            raise ValueError(
                f'{argument}: expected none with select="nonzero", which takes the density of each weight from its '
                f"zeros, got {got!r}; leave it out"
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
