"""One topology change of a weight: chooses the blocks to drop and to grow by the policies, and moves them.

All ranks that train a model must hold one topology. Where weights are sharded, every rank gets the scores of all blocks
and decides the same; data-parallel ranks take the choice of the first. Fingerprints of the new topologies are compared
before anything is changed.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import TopologyChange, block_means, digest_bits, pack_bits, patterns, unpack_bits
from smet_compile.format.arguments import number
from smet_compile.ops import Site
from smet_compile.ops.growth import Collected
from smet_compile.runtime import policies
from smet_compile.runtime.managed_optimizers import ManagedOptimizers, StateToMove
from smet_compile.runtime.policies import GradientPolicy, Policy, TopologyContext, check_scores, random_numbers
from smet_compile.shards import ALONE, Ranks, is_sharded

_KEPT_PER_GROWN = 2
"""Number of inactive blocks whose gradient is kept, for each that may grow: the best may change between gradients."""


@dataclass(frozen=True)
class Rules:
    """Holds what decides every update of a manager.

    Args:
        drop, grow: the policies. every: ΔT. seed: of everything random.
        ablation_threshold: the share of salient blocks below which a row of blocks is dropped as a whole, for the
            pattern "fan_in"; None to keep all rows.
        ranks: those that hold the model together, and have to agree.
    """

    drop: Policy
    grow: Policy
    every: int
    seed: int
    ablation_threshold: float | None = None
    ranks: Ranks = ALONE

    @classmethod
    def of(
        cls, drop: str | Policy, grow: str | Policy, every: int, seed: int, ablation_threshold: float | None
    ) -> Rules:
        """Makes the rules of policies, which may be named. Raises ValueError for an unknown one."""
        drop = policies.find_policy("drop", drop, policies.DROP_POLICIES)
        grow = policies.find_policy("grow", grow, policies.GROW_POLICIES)
        if ablation_threshold is not None:
            ablation_threshold = number("ablation_threshold", ablation_threshold, above=0, at_most=1)
        return cls(drop, grow, every, seed, ablation_threshold)

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the settings of a manager that are decided here, policies by their names."""
        return {
            "drop": policies.name_of_policy(self.drop, policies.DROP_POLICIES),
            "grow": policies.name_of_policy(self.grow, policies.GROW_POLICIES),
            "every": self.every,
            "seed": self.seed,
            "ablation_threshold": self.ablation_threshold,
        }

    @property
    def asking(self) -> list[GradientPolicy]:
        """Returns the policies that ask for the gradient."""
        return [policy for policy in (self.drop, self.grow) if isinstance(policy, GradientPolicy)]

    def agree_on(self, site: Site, positions: Tensor) -> Tensor:
        """Returns the positions that the first rank chose; where weights are sharded, all have chosen the same."""
        return positions if is_sharded(site.values) else self.ranks.from_first(positions)

    @property
    def for_untrained(self) -> Rules:
        """Returns the rules for a weight that a density stage finds without gradient: "magnitude" and "random"."""
        return dataclasses.replace(self, drop=policies.magnitude, grow=policies.random)

    def collect(self, site: Site, largest_fraction: float, num_grown: int = 0) -> Collected:
        """Makes the buffers for what the policies ask for.

        ``largest_fraction`` is the most that an update ever drops, ``num_grown`` what the next density stage grows.
        """
        size = patterns.group_size(site.compact.pattern, site.layout)
        num_groups = site.layout.num_blocks // size
        most_inactive = int((~site.mask()).view(-1, size).sum(1).max())
        num_kept = _KEPT_PER_GROWN * max(math.floor(largest_fraction * site.num_active) + 1, num_grown)
        of_group = max(1, min(math.ceil(num_kept / num_groups), most_inactive))
        with_active = isinstance(self.drop, GradientPolicy)
        return Collected.empty(site.values, site.layout, of_group * num_groups, with_active)


@dataclass(frozen=True)
class Move:
    """Holds the topology that one weight will have, as bits. Nothing has changed yet."""

    site: Site
    bits: Tensor


def choose_move(
    site: Site, rules: Rules, step: int, count: int, protected: Tensor | None, optimizers: ManagedOptimizers
) -> Move:
    """Chooses up to ``count`` blocks to drop and as many to grow in their groups. Changes nothing.

    Args:
        protected: the mask (num_blocks,) of the blocks that may not be dropped; None for none.

    Raises:
        ValueError: a policy returns scores of another shape, or NaN.
    """
    size = patterns.group_size(site.compact.pattern, site.layout)
    context = make_context(site, rules, step, count, optimizers)
    scores_N = check_scores(rules.drop(site, context), context)
    dropped = rules.agree_on(site, patterns.drop_smallest(scores_N, context.mask, count, size, protected))
    context = context.for_growth(rules.seed, dropped.numel())
    ablates = rules.ablation_threshold is not None and site.compact.pattern == patterns.FAN_IN
    after = _after_ablation(rules, context, dropped, size) if ablates else _after(rules, context, dropped, size)
    return Move(site, pack_bits(after))


def make_context(site: Site, rules: Rules, step: int, count: int, optimizers: ManagedOptimizers) -> TopologyContext:
    """Returns what the drop policy may look at, where ``count`` blocks are to be dropped."""
    collected = site.compact.collected
    return TopologyContext(
        site=site,
        half="drop",
        step=step,
        every=rules.every,
        count=count,
        mask=site.mask(),
        generator=random_numbers(rules.seed, step, site.name, "drop"),
        _read_ages=lambda: optimizers.ages(site.values),
        _read_state=lambda key: optimizers.read_state(site.values, key),
        _collected=_average(collected, site, rules.ranks) if collected is not None and rules.asking else None,
    )


def _after(rules: Rules, context: TopologyContext, dropped: Tensor, group_size: int) -> Tensor:
    """Returns the new mask, in which every group has grown as many blocks as it lost."""
    if rules.grow is policies.random:
        grown = patterns.grow_random(context.site.layout, context.mask, dropped, group_size, context.generator)
    else:
        scores = check_scores(rules.grow(context.site, context), context)
        grown = patterns.grow_largest(scores, context.mask, dropped, group_size)
    after = context.mask.index_fill(0, dropped, False)
    return after.index_fill_(0, rules.agree_on(context.site, grown), True)


def _after_ablation(rules: Rules, context: TopologyContext, dropped: Tensor, group_size: int) -> Tensor:
    """Returns the new mask, without the rows that have few salient blocks; the other rows share their blocks."""
    assert rules.ablation_threshold is not None
    mask, scores = context.mask, check_scores(rules.grow(context.site, context), context)
    kept = mask.index_fill(0, dropped, False)
    salient_G = patterns.count_salient(scores, mask, dropped, group_size)
    budgets_G = patterns.ablate(salient_G, mask, dropped, rules.ablation_threshold, group_size, context.generator)
    is_gone = (budgets_G == 0).repeat_interleave(group_size)
    kept &= ~is_gone
    grown = patterns.grow_to_budgets(scores, kept, mask & ~kept, budgets_G, group_size)
    return kept.index_fill_(0, rules.agree_on(context.site, grown), True)


def _average(collected: Collected, site: Site, ranks: Ranks) -> Collected:
    """Returns the mean over the ranks of what each collected; a block that a rank did not keep counts as zero there.

    Where backward reduces the gradients themselves, every rank has collected that mean already.
    """
    if ranks.num_ranks == 1 or site.compact.reduced_over:
        return collected
    positions, inverse = torch.cat(ranks.gather(collected.positions)).unique(return_inverse=True)
    sums = collected.sums.new_zeros(positions.numel(), *collected.sums.shape[1:])
    sums.index_add_(0, inverse, torch.cat(ranks.gather(collected.sums))).div_(ranks.num_ranks)
    best = block_means(sums, positions, site.layout).argsort(descending=True, stable=True)
    active_sums = torch.stack(ranks.gather(collected.active_sums)).mean(0)
    return Collected(positions[best], sums[best], active_sums)


def digest_start(settings: dict[str, Any], sites: dict[str, Site]) -> dict[str, int]:
    """Returns numbers that are the same on all ranks where settings, seeds and topologies are."""
    of_settings = zlib.crc32(repr(sorted(settings.items())).encode())
    return {"TopologyManager": of_settings} | {n: digest_bits(site.compact.topology)[1] for n, site in sites.items()}


def check_agreement(find_digests: Callable[[], dict[str, int]], ranks: Ranks, device: torch.device) -> None:
    """Raises ValueError on every rank where one of them has another number for a name than the others.

    One process has nobody to agree with, and does not ask for its digests.
    """
    if ranks.num_ranks == 1:
        return
    digests = find_digests()
    numbers = list(digests.values())
    least, greatest = ranks.least(numbers, device), [~each for each in ranks.least([~n for n in numbers], device)]
    for name, low, high in zip(digests, least, greatest, strict=True):
        if low != high:
            raise ValueError(
                f"{name}: expected the same on all {ranks.num_ranks} ranks, got others on some; sparsify and make the "
                "manager on every rank with the same seed and settings, and call manager.step() on every rank after "
                "every step"
            )


def digest_moves(moves: list[Move]) -> dict[str, int]:
    """Returns fingerprints of the topologies that weights will have."""
    return {move.site.name: digest_bits(move.bits)[1] for move in moves}


def make_move(move: Move, state: StateToMove) -> None:
    """Drops and grows the blocks of a move.

    Values, gradient, topology and optimizer state change in place. Where the number of blocks changes, the weight and
    its state get new memory, and the gradient is dropped. ``state`` is the optimizer state that follows.
    """
    site, after = move.site, unpack_bits(move.bits, move.site.layout.num_blocks)
    change = TopologyChange.between(site.values, site.mask(), after)
    if change.resizes:
        site.compact.resize(site.values, after, change.moved(site.values.detach()))
        site.mark_resized()
    else:
        change.remap_(site.values)
        if site.values.grad is not None:
            change.remap_(site.values.grad)
        site.compact.set_bits(move.bits)
    state.follow(site, change)
