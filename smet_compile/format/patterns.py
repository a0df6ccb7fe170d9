"""Restricts which blocks of a weight may be active: groups of consecutive blocks, each with a budget of active ones.

A pattern travels as its text. ``None`` has one group, the whole weight; ``"fan_in"`` has one per row of blocks, whose
budgets differ by at most one (SRigL, arXiv 2305.02299); ``"N:M"`` has one per M single weights along a row, with N
active. All that these have in common is the number of blocks in a group, so one implementation serves them: blocks are
dropped over the whole weight, and each group grows as many as it lost.

Shape suffixes: N active blocks, P positions, G groups. Masks and scores without a suffix are (num_blocks,), row-major.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from smet_compile.format.arguments import described
from smet_compile.format.layout import Layout
from smet_compile.format.sampling import even_shares, sample_evenly, sample_positions, sample_rows
from smet_compile.format.topology import positions_of

FAN_IN = "fan_in"
_N_OF_M = re.compile(r"(\d{1,9}):(\d{1,9})")


def check_pattern(pattern: object) -> str | None:
    """Returns ``pattern``, which is None, "fan_in" or "N:M" with 0 < N < M. Raises ValueError for anything else."""
    if pattern is None:
        return None
    if isinstance(pattern, str) and pattern == FAN_IN:
        return FAN_IN
    found = _N_OF_M.fullmatch(pattern) if isinstance(pattern, str) else None
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(
            f'pattern: expected None, "fan_in" or "N:M" with 0 < N < M, got {described(pattern)}; pass for example '
            '"2:4"'
        )
    return f"{int(found[1])}:{int(found[2])}"


def n_of_m(pattern: str | None) -> tuple[int, int] | None:
    """Returns N and M of a pattern "N:M"; None for another one."""
    if pattern is None or pattern == FAN_IN:
        return None
    num_active, of = pattern.split(":")
    return int(num_active), int(of)


def group_size(pattern: str | None, layout: Layout, name: str = "pattern") -> int:
    """Returns the number of blocks in a group, which divides the number of blocks.

    Raises ValueError, which begins with ``name``, for a layout that the pattern does not divide.
    """
    ratio = n_of_m(pattern)
    if ratio is None:
        return layout.num_blocks if pattern is None else layout.block_cols
    if not layout.single_weights:
        raise ValueError(
            f'{name}: expected single weights for the pattern "{pattern}", got blocks of {layout.block_shape}; pass '
            'block_shape=1, or pattern="fan_in"'
        )
    if layout.cols % ratio[1]:
        raise ValueError(
            f'{name}: expected a number of columns that {ratio[1]} divides for the pattern "{pattern}", got '
            f"{layout.cols}; leave the weight dense with exclude=, or take another pattern"
        )
    return ratio[1]


def fixed_count(pattern: str | None, layout: Layout, name: str = "pattern") -> int | None:
    """Returns the number of active blocks that follows from the pattern alone; None where any number is possible."""
    ratio = n_of_m(pattern)
    return None if ratio is None else layout.num_blocks // group_size(pattern, layout, name) * ratio[0]


def budgets(pattern: str | None, layout: Layout, num_active: int, generator: torch.Generator) -> Tensor:
    """Returns how many blocks of each group are active, (G,) on the CPU: all alike, the rest drawn by ``generator``."""
    size = group_size(pattern, layout)
    _check_count(pattern, layout, num_active)
    empty_G = torch.zeros(layout.num_blocks // size, dtype=torch.int64)
    return even_shares(empty_G, torch.full_like(empty_G, size), num_active, generator)


def _check_count(pattern: str | None, layout: Layout, num_active: int) -> None:
    fixed = fixed_count(pattern, layout)
    if num_active != (num_active if fixed is None else fixed):
        raise ValueError(f'pattern: expected {fixed:,} active blocks for "{pattern}", got {num_active:,}')


def sample(pattern: str | None, layout: Layout, num_active: int, generator: torch.Generator) -> Tensor:
    """Draws the positions (N,) of the first active blocks, on the CPU.

    They are uniform in each group. Tiles are drawn so that rows and columns of tiles fill evenly (``sample_evenly``).
    """
    empty = torch.zeros(layout.num_blocks, dtype=torch.bool)
    if pattern is None:
        return _sample_anywhere(empty, empty, layout, num_active, generator)
    return _sample_in_groups(empty, empty, layout, budgets(pattern, layout, num_active, generator), generator)


def select_largest(scores: Tensor, pattern: str | None, layout: Layout, num_active: int) -> Tensor:
    """Returns the positions (N,) of the best-scored blocks. Where budgets differ by one, the best scores decide."""
    if pattern is None:
        return scores.topk(num_active, sorted=False).indices
    _check_count(pattern, layout, num_active)
    size = group_size(pattern, layout)
    each, rest = divmod(num_active, layout.num_blocks // size)
    every = torch.ones(layout.num_blocks, dtype=torch.bool, device=scores.device)
    each_G = torch.full((layout.num_blocks // size,), each, device=scores.device)
    chosen = largest_in_groups(scores, every, each_G, size)
    every[chosen] = False
    next_best = largest_in_groups(scores, every, torch.ones_like(each_G), size)
    return torch.cat((chosen, next_best[scores[next_best].topk(rest, sorted=False).indices]))


def check_mask(name: str, mask: Tensor, pattern: str | None, layout: Layout) -> None:
    """Raises ValueError, which begins with ``name``, where the active blocks do not keep to the pattern.

    With "fan_in" a row without any active block is legal, since neurons may be ablated; all others differ by at most
    one.
    """
    if error := mask_error(mask, pattern, layout, name):
        raise ValueError(f"{name}: {error}; pass a mask that keeps to the pattern, or pattern=None")


def mask_error(mask: Tensor, pattern: str | None, layout: Layout, name: str = "pattern") -> str | None:
    """Says how the active blocks break the pattern; None where they keep to it."""
    if pattern is None:
        return None
    counts_G, ratio = _per_group(mask, group_size(pattern, layout, name)), n_of_m(pattern)
    counts = counts_G[counts_G > 0] if ratio is None else counts_G
    least, most = int(counts.min()), int(counts.max())
    if ratio is None and most - least > 1:
        return (
            f'expected rows whose active blocks differ by at most one for the pattern "fan_in", got {least} to {most}'
        )
    if ratio is not None and (least, most) != (ratio[0], ratio[0]):
        each = f"{ratio[0]} active weights in every {ratio[1]} along a row"
        return f'expected {each} for the pattern "{pattern}", got {least} to {most}'
    return None


def drop_smallest(
    scores_N: Tensor, mask: Tensor, count: int, group_size: int, protected: Tensor | None = None
) -> Tensor:
    """Returns the positions of the ``count`` active blocks of least score, over the whole weight.

    No group drops more than it has inactive blocks, since growth may not take what was just dropped, and no protected
    block is dropped. Where that leaves fewer than ``count``, fewer are returned.

    Args:
        scores_N: in order of the positions of active blocks. protected: a mask (num_blocks,).
    """
    positions, scores = positions_of(mask), scores_N
    if group_size == mask.numel():
        num_protected = 0
        if protected is not None:
            scores, num_protected = _protected_last(scores, protected.index_select(0, positions))
        num_inactive, num_allowed = mask.numel() - positions.numel(), positions.numel() - num_protected
        return positions[scores.topk(min(count, num_inactive, num_allowed), largest=False, sorted=False).indices]
    if protected is not None:
        allowed = positions_of(~protected.index_select(0, positions))
        positions, scores = positions[allowed], scores[allowed]
    most_G = _per_group(~mask, group_size).clamp(max=count)
    candidates = _first_in_groups(scores, positions, most_G, group_size, largest=False)
    least = scores[candidates].topk(min(count, candidates.numel()), largest=False, sorted=False).indices
    return positions[candidates[least]]


def _protected_last(scores_N: Tensor, protected_N: Tensor) -> tuple[Tensor, int]:
    """Returns scores above which those of protected blocks lie, which are infinite, and the number of these."""
    scores = scores_N if scores_N.is_floating_point() else scores_N.double()
    finite = scores.clamp(max=torch.finfo(scores.dtype).max)
    return finite.masked_fill_(protected_N, torch.inf), int(protected_N.count_nonzero())


def grow_largest(scores: Tensor, mask: Tensor, dropped: Tensor, group_size: int) -> Tensor:
    """Returns the positions of the best-scored inactive blocks, as many in each group as it has in ``dropped``.

    ``mask`` is that before the drop, so that nothing just dropped grows again.
    """
    return largest_in_groups(scores, ~mask, _lost(mask, dropped, group_size), group_size)


def grow_random(layout: Layout, mask: Tensor, dropped: Tensor, group_size: int, generator: torch.Generator) -> Tensor:
    """Returns the positions of random inactive blocks, as many in each group as it has in ``dropped``.

    They are uniform, or for tiles in the emptiest columns of tiles, and with one group in the emptiest rows too.
    ``mask`` is that before the drop.
    """
    kept = _without(mask, dropped)
    if group_size == mask.numel():
        return _sample_anywhere(kept, mask, layout, dropped.numel(), generator)
    return _sample_in_groups(kept, mask, layout, _lost(mask, dropped, group_size), generator)


def has_room(mask: Tensor, num_active: int, group_size: int) -> bool:
    """Tells whether the groups that have an active block can hold ``num_active`` blocks together."""
    return num_active <= int((_per_group(mask, group_size) > 0).sum()) * group_size


def select_resized(ranks: Tensor, mask: Tensor, num_active: int, group_size: int) -> Tensor:
    """Returns the positions of the ``num_active`` blocks of highest rank, where groups differ by at most one block.

    Groups without an active block stay so. Where the others have no room for all blocks, all groups get some.

    Args:
        ranks: those of active blocks are above all others, so that a smaller number of blocks only drops, and a larger
            one for which there is room only grows.
        mask: the active blocks before, as many in each group, within one.
    """
    live_G = _per_group(mask, group_size) > 0
    if not has_room(mask, num_active, group_size):
        live_G.fill_(True)
    each, rest = divmod(num_active, int(live_G.sum()))
    allowed = torch.ones_like(mask)
    chosen = largest_in_groups(ranks, allowed, each * live_G, group_size)
    allowed[chosen] = False
    next_best = largest_in_groups(ranks, allowed, live_G.long(), group_size)
    return torch.cat((chosen, next_best[ranks[next_best].topk(rest, sorted=False).indices]))


def grow_more_random(layout: Layout, mask: Tensor, count: int, group_size: int, generator: torch.Generator) -> Tensor:
    """Returns the positions of ``count`` random inactive blocks, for which there is room, so that groups fill evenly.

    They are uniform, or for tiles in the emptiest columns of tiles, and with one group in the emptiest rows too.
    """
    if group_size == mask.numel():
        return _sample_anywhere(mask, mask, layout, count, generator)
    held_G = _per_group(mask, group_size).cpu()
    free_G = torch.where(held_G > 0, group_size - held_G, 0)
    return _sample_in_groups(mask, mask, layout, even_shares(held_G, free_G, count, generator), generator)


def grow_to_budgets(scores: Tensor, kept: Tensor, forbidden: Tensor, budgets_G: Tensor, group_size: int) -> Tensor:
    """Returns the positions of the best-scored blocks that fill each group of ``kept`` up to its budget.

    Args:
        kept: the mask of the blocks that stay active; no group has more than its budget.
        forbidden: the mask of the blocks that must not grow, such as those just dropped.
    """
    return largest_in_groups(scores, ~(kept | forbidden), budgets_G - _per_group(kept, group_size), group_size)


def largest_in_groups(scores: Tensor, allowed: Tensor, counts_G: Tensor, group_size: int) -> Tensor:
    """Returns the positions of the ``counts_G`` best-scored allowed blocks of each group; fewer where fewer are."""
    positions = positions_of(allowed)
    return positions[_first_in_groups(scores[positions], positions, counts_G, group_size, largest=True)]


def count_salient(scores: Tensor, mask: Tensor, dropped: Tensor, group_size: int) -> Tensor:
    """Counts the salient blocks of each group (G,), for ``ablate``.

    These are the active blocks that are kept, and as many of the best-scored inactive blocks of the whole weight as
    are dropped.
    """
    inactive, salient = positions_of(~mask), _without(mask, dropped)
    count = min(dropped.numel(), inactive.numel())
    salient[inactive[scores[inactive].topk(count, sorted=False).indices]] = True
    return _per_group(salient, group_size)


def ablate(
    salient_G: Tensor, mask: Tensor, dropped: Tensor, gamma: float, group_size: int, generator: torch.Generator
) -> Tensor:
    """Returns a new budget (G,) for each row of blocks: 0 for a row with few salient blocks (SRigL, arXiv 2305.02299).

    A row is ablated where it has fewer salient blocks than ``gamma`` times its active ones. The other rows share the
    active blocks evenly. None gets fewer than it keeps, nor more than it can hold without what was just dropped; where
    the others cannot hold all blocks, the least salient rows alone are ablated. A row without active blocks stays so.

    Args:
        salient_G: how many blocks of each row are salient (``count_salient``).
        mask: the active blocks before the drop.
        dropped: positions of the blocks that are dropped in any case.
    """
    kept_G = _per_group(_without(mask, dropped), group_size)
    free_G, active_G = _per_group(~mask, group_size), _per_group(mask, group_size)
    share_G = salient_G / active_G.clamp(min=1)
    share_G[active_G == 0] = -1  # these come first, and are ablated whatever else is
    order = share_G.argsort()
    room = (kept_G + free_G)[order]
    others_suffice = room.sum() - room.cumsum(0) >= active_G.sum()
    gone = order[(share_G[order] < gamma) & (others_suffice | (active_G[order] == 0))]
    kept_G[gone] = 0
    free_G[gone] = 0
    held, free = kept_G.cpu(), free_G.cpu()
    return (held + even_shares(held, free, int(active_G.sum() - kept_G.sum()), generator)).to(mask.device)


def _sample_anywhere(active: Tensor, taken: Tensor, layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    if layout.tiles:
        return sample_evenly(active, taken, layout, count, generator)
    return sample_positions(taken, count, generator)


def _sample_in_groups(
    active: Tensor, taken: Tensor, layout: Layout, counts_G: Tensor, generator: torch.Generator
) -> Tensor:
    if layout.tiles:
        return sample_rows(active, taken, layout, counts_G, generator)
    chances = torch.rand(taken.numel(), generator=generator).to(taken.device)
    return largest_in_groups(chances, ~taken, counts_G.to(taken.device), taken.numel() // counts_G.numel())


def _first_in_groups(scores_P: Tensor, positions: Tensor, counts_G: Tensor, group_size: int, largest: bool) -> Tensor:
    """Returns which of P ``positions`` have the ``counts_G`` largest, or smallest, scores of their groups."""
    if counts_G.numel() == 1:
        return scores_P.topk(min(int(counts_G), positions.numel()), largest=largest, sorted=False).indices
    scores = scores_P.new_zeros(counts_G.numel() * group_size)
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    scores[positions], allowed[positions] = scores_P, True
    order = scores.view(-1, group_size).argsort(1, descending=largest)
    in_order = allowed.view(-1, group_size).gather(1, order)
    first = in_order & (in_order.cumsum(1, dtype=torch.int32) <= counts_G[:, None])
    return positions_of(torch.zeros_like(first).scatter_(1, order, first).flatten()[positions])


def _per_group(mask: Tensor, group_size: int) -> Tensor:
    """Counts the true entries of each group (G,)."""
    return mask.view(-1, group_size).sum(1)


def _lost(mask: Tensor, dropped: Tensor, group_size: int) -> Tensor:
    """Counts the dropped blocks of each group (G,)."""
    return torch.bincount(dropped // group_size, minlength=mask.numel() // group_size)


def _without(mask: Tensor, dropped: Tensor) -> Tensor:
    kept = mask.clone()
    kept[dropped] = False
    return kept
