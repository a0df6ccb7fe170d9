"""Checks the rows that a topology change must keep, and those that it must clear, by block position."""

from torch import Tensor

from tests.support.snapshots import same_bits


def rows_of(mask: Tensor, wanted: Tensor) -> Tensor:
    """Returns the row numbers, in the compact tensor of `mask`, of the active blocks in `wanted`."""
    assert not bool((wanted & ~mask).any())
    return (mask.cumsum(0) - 1)[wanted]


def assert_moved(
    before: Tensor, old_mask: Tensor, after: Tensor, new_mask: Tensor, what: str, fresh: float = 0.0
) -> None:
    """Checks that survivors are the same bit for bit, and newcomers ``fresh``."""
    survivors, newcomers = old_mask & new_mask, new_mask & ~old_mask
    assert after.shape == before.shape, what
    kept = same_bits(after[rows_of(new_mask, survivors)], before[rows_of(old_mask, survivors)])
    assert kept, f"{what}: a survivor changed"
    assert bool((after[rows_of(new_mask, newcomers)] == fresh).all()), f"{what}: a newcomer is not {fresh}"
