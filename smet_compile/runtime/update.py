"""One topology change of a weight: chooses the blocks to drop and to grow by the policies, and moves them.

All ranks that train a model must hold one topology. Where weights are sharded, every rank gets the scores of all blocks
and decides the same; data-parallel ranks take the choice of the first. Fingerprints of the new topologies are compared
before anything is changed.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from smet_compile.format import (
    Band,
    Part,
    TopologyChange,
    bands_of,
    block_means,
    digest_bits,
    pack_bits,
    patterns,
    unpack_bits,
)
from smet_compile.format.arguments import number
from smet_compile.ops import Site
from smet_compile.ops.growth import Collected
from smet_compile.runtime import policies
from smet_compile.runtime.history import SiteEvent, Trace
from smet_compile.runtime.managed_optimizers import ManagedOptimizers, StateToMove
from smet_compile.runtime.policies import GradientPolicy, Policy, TopologyContext, check_scores
from smet_compile.shards import ALONE, Ranks, is_sharded, named

_KEPT_PER_GROWN = 2
"""Number of inactive blocks whose gradient is kept, for each that may grow: the best may change between gradients."""


@dataclass(frozen=True)
class Rules:
    """Holds what decides every update of a manager.

    Args:
        drop, grow: the policies. every: ΔT. seed: of everything random.
        ablation_threshold: the share of salient blocks below which a row of blocks is dropped as a whole, for the
            pattern "fan_in"; None to keep all rows.
        ranks: those that train the model together, and have to agree. alike: those of them that hold the same parts of
            weights.
    """

    drop: Policy
    grow: Policy
    every: int
    seed: int
    ablation_threshold: float | None = None
    ranks: Ranks = ALONE
    alike: Ranks = ALONE

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
        bands = bands_of(site.layout)
        size = patterns.group_size(site.compact.pattern, bands[0].layout)
        num_groups = bands[0].layout.num_blocks // size
        inactive = ~unpack_bits(site.compact.topology, site.layout.num_blocks)  # may be loaded, but not yet accepted
        most_inactive = max(int(band.cut(inactive).view(-1, size).sum(1).max()) for band in bands)
        num_active = site.num_active // len(bands)
        num_kept = _KEPT_PER_GROWN * max(math.floor(largest_fraction * num_active) + 1, num_grown)
        of_group = max(1, min(math.ceil(num_kept / num_groups), most_inactive))
        num_with_active = site.num_active if isinstance(self.drop, GradientPolicy) else 0
        return Collected.empty(site.values, site.layout, of_group * num_groups * len(bands), num_with_active)


@dataclass(frozen=True)
class Move:
    """Holds the topology that one weight will have, as bits. Nothing has changed yet."""

    site: Site
    bits: Tensor


def choose_move(
    site: Site, rules: Rules, step: int, count: int, protected: Tensor | None, optimizers: ManagedOptimizers
) -> Move:
    """Chooses up to ``count`` blocks to drop in each slab, and as many to grow in their groups. Changes nothing.

    Args:
        protected: the mask (num_blocks,) of the blocks that may not be dropped; None for none.

    Raises:
        ValueError: a policy returns scores of another shape, or NaN.
    """
    context = make_context(site, rules, step, count * site.layout.num_slabs, optimizers)
    scores_N = check_scores(rules.drop(site, context), context)
    slabs = [_Slab.of(band, context.mask, site.compact.pattern) for band in bands_of(site.layout)]
    for slab in slabs:
        scores, its_protected = slab.band.of_active(scores_N, context.mask), _cut(slab.band, protected)
        least = patterns.drop_smallest(scores, slab.mask, count, slab.group_size, its_protected)
        slab.dropped = rules.agree_on(site, least)
    context = context.for_growth([slab.dropped.numel() for slab in slabs])
    ablates = rules.ablation_threshold is not None and site.compact.pattern == patterns.FAN_IN
    is_random = rules.grow is policies.random and not ablates
    grow_scores = None if is_random else check_scores(rules.grow(site, context), context)
    after = torch.empty_like(context.mask)
    for slab in slabs:
        its_scores, generator = _cut(slab.band, grow_scores), context.generator_for(slab.band)
        new = _after_ablation if ablates else _after
        slab.band.paste_(after, new(rules, site, slab, its_scores, generator))
    return Move(site, pack_bits(after))


@dataclass
class _Slab:
    """Holds what an update needs of one slab of a weight: its blocks, those dropped, and the groups of its pattern."""

    band: Band
    mask: Tensor
    group_size: int
    dropped: Tensor

    @classmethod
    def of(cls, band: Band, mask: Tensor, pattern: str | None) -> _Slab:
        """Describes a slab of the weight with this mask (num_blocks,), of which nothing is dropped yet."""
        none = torch.empty(0, dtype=torch.int64, device=mask.device)
        return cls(band, band.cut(mask), patterns.group_size(pattern, band.layout), none)


def _cut(band: Band, blocks: Tensor | None) -> Tensor | None:
    return None if blocks is None else band.cut(blocks)


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
        seed=rules.seed,
        _read_ages=lambda: optimizers.ages(site.values),
        _read_state=lambda key: optimizers.read_state(site.values, key),
        _collected=_average(collected, site, rules.alike) if collected is not None and rules.asking else None,
    )


def _after(rules: Rules, site: Site, slab: _Slab, scores: Tensor | None, generator: torch.Generator) -> Tensor:
    """Returns the new mask of a slab, in which every group has grown as many blocks as it lost; at random, or by score.

    ``scores`` are those of all blocks of the slab.
    """
    mask, dropped, size = slab.mask, slab.dropped, slab.group_size
    if scores is None:
        grown = patterns.grow_random(slab.band.layout, mask, dropped, size, generator)
    else:
        grown = patterns.grow_largest(scores, mask, dropped, size)
    return mask.index_fill(0, dropped, False).index_fill_(0, rules.agree_on(site, grown), True)


def _after_ablation(rules: Rules, site: Site, slab: _Slab, scores: Tensor | None, generator: torch.Generator) -> Tensor:
    """Returns the new mask of a slab, without the rows that have few salient blocks; the other rows share them."""
    assert rules.ablation_threshold is not None and scores is not None
    mask, dropped, size = slab.mask, slab.dropped, slab.group_size
    kept = mask.index_fill(0, dropped, False)
    salient_G = patterns.count_salient(scores, mask, dropped, size)
    budgets_G = patterns.ablate(salient_G, mask, dropped, rules.ablation_threshold, size, generator)
    is_gone = (budgets_G == 0).repeat_interleave(size)
    kept &= ~is_gone
    grown = patterns.grow_to_budgets(scores, kept, mask & ~kept, budgets_G, size)
    return kept.index_fill_(0, rules.agree_on(site, grown), True)


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


def find_ranks(model: nn.Module, sites: Mapping[str, Site]) -> tuple[Ranks, Ranks]:
    """Returns the ranks that train ``model``, and those of them that hold the same parts of its compact weights.

    They differ under tensor parallelism alone.
    """
    everyone = Ranks.of(model)
    parts = [site.part for site in sites.values() if site.part is not None]
    return everyone, everyone.without(part.group for part in parts) if parts else everyone


def check_start(settings: dict[str, Any], sites: Mapping[str, Site], everyone: Ranks, alike: Ranks) -> None:
    """Raises ValueError on every rank where settings or seeds differ on some, or the topologies of one part."""
    bits = [(site, site.compact.topology) for site in sites.values()]
    of_settings = {"TopologyManager": zlib.crc32(repr(sorted(settings.items())).encode())}
    _check_agreement(lambda: of_settings | _digests(bits, of_parts=False), everyone, bits[0][1].device)
    _check_agreement(lambda: _digests(bits, of_parts=True), alike, bits[0][1].device)


def check_moves(moves: Iterable[Move], everyone: Ranks, alike: Ranks) -> None:
    """Raises ValueError on every rank where weights will have other topologies on some ranks than on others."""
    bits = [(move.site, move.bits) for move in moves]
    _check_agreement(lambda: _digests(bits, of_parts=False), everyone, bits[0][1].device)
    _check_agreement(lambda: _digests(bits, of_parts=True), alike, bits[0][1].device)


def _digests(bits: Iterable[tuple[Site, Tensor]], of_parts: bool) -> dict[str, int]:
    """Returns fingerprints of topologies by the names of weights: of parts of weights, or of whole ones."""
    return {site.name: digest_bits(each)[1] for site, each in bits if (site.part is not None) is of_parts}


def _check_agreement(find_digests: Callable[[], dict[str, int]], ranks: Ranks, device: torch.device) -> None:
    """Raises ValueError on every rank where one of them has another number for a name than the others.

    One process has nobody to agree with, and does not ask for its digests.
    """
    if ranks.num_ranks == 1:
        return
    digests = find_digests()
    if not digests:
        return
    numbers = list(digests.values())
    least, greatest = ranks.least(numbers, device), [~each for each in ranks.least([~n for n in numbers], device)]
    for name, low, high in zip(digests, least, greatest, strict=True):
        if low != high:
            raise ValueError(
                f"{name}: expected the same on all {ranks.num_ranks} ranks, got others on some; sparsify and make the "
                "manager on every rank with the same seed and settings, and call manager.step() on every rank after "
                "every step"
            )


def make_move(move: Move, state: StateToMove) -> None:
    """Drops and grows the blocks of a move.

    Values, gradient, topology and optimizer state change in place. Where the number of blocks changes, the weight and
    its state get new memory, and the gradient is dropped. ``state`` is the optimizer state that follows.
    """
    site, after = move.site, unpack_bits(move.bits, move.site.layout.num_blocks)
    change = TopologyChange.between(site.values, site.mask(), after, site.part)
    if change.resizes:
        site.compact.resize(site.values, after, change.moved(site.values.detach()))
        site.mark_resized()
    else:
        change.remap_(site.values)
        if site.values.grad is not None:
            change.remap_(site.values.grad)
        site.compact.set_bits(move.bits)
    state.follow(site, change)


def make_and_record(move: Move, step: int, optimizers: ManagedOptimizers, trace: Trace) -> SiteEvent:
    """Makes a move after ``step``, as ``make_move`` does; returns what happened to the whole weight."""
    site, ages = move.site, optimizers.ages(move.site.values)
    mean_age = None if ages is None else _mean_over_parts(ages, site.part)
    before, after = (site.bits_of_whole(bits).cpu().clone() for bits in (site.compact.topology, move.bits))
    make_move(move, optimizers.state)
    return trace.record(site.name, before, after, step, mean_age)


def _mean_over_parts(ages: Tensor, part: Part | None) -> float:
    """Returns the mean age of the active blocks of the whole weight; ``ages`` (N,) int64 are those of this part."""
    total, count = ages.double().sum(), ages.numel()
    if part is not None:
        with named("adding up ages"):
            distributed.all_reduce(total, group=part.group)
        count *= part.count
    return float(total / count)
