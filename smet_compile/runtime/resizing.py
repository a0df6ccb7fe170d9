"""Chooses the blocks of one weight in a density stage, by the policies that also choose those of an update.

Shape suffix: N active blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.format import pack_bits, patterns, positions_of
from smet_compile.ops import Site
from smet_compile.runtime import policies
from smet_compile.runtime.managed_optimizers import ManagedOptimizers
from smet_compile.runtime.policies import TopologyContext, check_scores
from smet_compile.runtime.update import Move, Rules, make_context


def choose_resize(
    site: Site, rules: Rules, step: int, num_active: int, protected: Tensor | None, optimizers: ManagedOptimizers
) -> Move:
    """Chooses the blocks of a density stage, ``num_active`` of them. Changes nothing.

    To drop, those of largest score stay, the ``protected`` ones (num_blocks,) before all others. To grow, all stay.

    Raises:
        ValueError: a policy returns scores of another shape, or NaN.
    """
    before, size = site.mask(), patterns.group_size(site.compact.pattern, site.layout)
    context = make_context(site, rules, step, abs(num_active - site.num_active), optimizers)
    if num_active < site.num_active:
        after = _shrunk(rules, context, num_active, size, protected)
    else:
        after = _extended(rules, context.for_growth([context.count]), num_active, size)
    return Move(site, pack_bits(torch.zeros_like(before).index_fill_(0, after, True)))


def _shrunk(
    rules: Rules, context: TopologyContext, num_active: int, group_size: int, protected: Tensor | None
) -> Tensor:
    mask = context.mask
    positions = positions_of(mask)
    ranks_N = _ranks(check_scores(rules.drop(context.site, context), context), context.generator) + 1
    if protected is not None:
        ranks_N += positions.numel() * protected[positions]
    ranks = ranks_N.new_zeros(mask.numel()).index_copy_(0, positions, ranks_N)
    return patterns.select_resized(ranks, mask, num_active, group_size)


def _extended(rules: Rules, context: TopologyContext, num_active: int, group_size: int) -> Tensor:
    site, mask = context.site, context.mask
    if rules.grow is policies.random and patterns.has_room(mask, num_active, group_size):
        more = patterns.grow_more_random(site.layout, mask, context.count, group_size, context.generator)
        return torch.cat((positions_of(mask), more))
    ranks = _ranks(check_scores(rules.grow(site, context), context), context.generator)
    return patterns.select_resized(ranks + mask.numel() * mask, mask, num_active, group_size)


def _ranks(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the place of each score in ascending order, so that no score is too large to be exceeded.

    Equal scores come in random order: by position they would fill, or empty, the matrix row by row. Where a stage grows
    more blocks than gradients were kept for, all others have one score.
    """
    shuffled = torch.randperm(scores.numel(), generator=generator).to(scores.device)
    order = shuffled[scores[shuffled].argsort(stable=True)]
    return torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
