"""Keeps the zeros of a model that was pruned elsewhere: which blocks hold something, and how many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from smet_compile.format import Layout, all_block_means


def nonzero_blocks(dense: Tensor, layout: Layout) -> Tensor:
    """(num_blocks,) bool: the blocks with an entry other than zero; the first one where there is none."""
    mask = all_block_means(dense.detach() != 0, layout) > 0
    if not mask.any():
        mask[0] = True
    return mask


def count_nonzero_blocks(name: str, dense: Tensor, layout: Layout) -> int:
    """The number of blocks that ``nonzero_blocks`` keeps. Raises ValueError where there is no data."""
    if dense.is_meta:
        raise ValueError(
            f'{name}: expected a weight with data for select="nonzero", got one on the meta device; load the pruned '
            "weights first"
        )
    return int(nonzero_blocks(dense, layout).sum())


def check_nothing_else_says_density(
    density: float | None, rules: Mapping[str, float] | None, distribution: str
) -> None:
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
