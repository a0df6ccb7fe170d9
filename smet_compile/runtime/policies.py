"""Scores blocks: a drop policy for the active ones, of which the smallest go, a grow policy for where others may come.

A policy is any function ``(site, context) → scores``. A drop policy returns one score for each active block, (N,), and
the blocks of smallest score are dropped. A grow policy returns one for every block, (num_blocks,), and the inactive
blocks of largest score are grown. Shape suffix: N active blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from smet_compile.format import Band, all_block_means, bands_of, block_means, blocks, positions_of
from smet_compile.format.arguments import described, function, number, qualified_name, whole_number
from smet_compile.ops import Site
from smet_compile.ops.growth import Collected
from smet_compile.ops.law import compute_dtype
from smet_compile.shards import is_sharded, local

DropName = Literal["magnitude", "relative_magnitude", "saliency", "momentum", "random"]
GrowName = Literal["random", "gradient", "momentum"]
Policy = Callable[[Site, "TopologyContext"], Tensor]


@dataclass(frozen=True)
class TopologyContext:
    """Holds what a policy may look at, for one weight in one update.

    Args:
        step: number of optimizer steps so far.
        every: steps between updates (ΔT).
        count: number of blocks to drop, or to grow.
        mask: (num_blocks,) bool, the active blocks before the update.
        half: "drop" or "grow", the half of the update that scores are wanted for.
        seed: that of the manager.
        counts: number of blocks to grow in each slab of the weight; None in the first half.
    """

    site: Site = field(repr=False)
    half: Literal["drop", "grow"]
    step: int
    every: int
    count: int
    mask: Tensor = field(repr=False)
    seed: int
    _read_ages: Callable[[], Tensor | None] = field(repr=False)
    _read_state: Callable[[str], Tensor | None] = field(repr=False)
    _collected: Collected | None = field(repr=False)
    counts: list[int] | None = None

    def for_growth(self, counts: list[int]) -> TopologyContext:
        """Returns the context of the second half of the update, which grows so many blocks in each slab."""
        return dataclasses.replace(self, half="grow", count=sum(counts), counts=counts)

    @functools.cached_property
    def generator(self) -> torch.Generator:
        """Returns random numbers that follow from seed, step, weight and policy, the same in a resumed run."""
        return self._generator(None if self.site.layout.slabs is None else self.site.layout.slabs.first)

    def generator_for(self, band: Band) -> torch.Generator:
        """Returns the random numbers of one slab, the same on any number of ranks; ``generator`` without slabs."""
        return self.generator if band.key is None else self._generator(band.key)

    def _generator(self, key: int | None) -> torch.Generator:
        name = self.site.name if key is None else f"{self.site.name} {key}"
        return random_numbers(self.seed, self.step, name, "drop" if self.half == "drop" else "")

    @property
    def ages(self) -> Tensor | None:
        """Returns the optimizer steps since each active block was grown, (N,) int64; None where nobody keeps ages."""
        return self._read_ages()

    @property
    def scores_shape(self) -> tuple[int]:
        """Returns the shape of the scores: (N,) to drop, (num_blocks,) to grow."""
        return (self.site.num_active if self.half == "drop" else self.site.layout.num_blocks,)

    def block_means(self, tensor: Tensor) -> Tensor:
        """Returns the mean magnitude of each block, over the entries inside the matrix; at least fp32.

        ``tensor`` is shaped like the values, which gives (N,), or like the dense weight, which gives (num_blocks,).
        Where the values are sharded, so is a tensor like them, and every rank gets the means of all blocks.
        """
        layout, shape = self.site.layout, tuple(tensor.shape)
        like_values, like_dense = shape == tuple(self.site.values.shape), shape == layout.shape
        if like_values and (self.half == "drop" or not like_dense):
            rows, here = self.site.rows, local(tensor.detach())
            if layout.single_weights:
                return rows.gather(all_block_means(here, layout))
            return rows.gather(block_means(here, positions_of(self.mask)[rows.here], layout))
        if like_dense:
            return all_block_means(tensor.detach(), layout)
        raise ValueError(
            f"{self.site.name}: expected a tensor like the values, {tuple(self.site.values.shape)}, or like the dense "
            f"weight, {layout.shape}, got {shape}"
        )

    def state(self, *names: str) -> Tensor:
        """Returns the optimizer's state of this name for the values, at least fp32; the first of ``names`` it has.

        It is sharded as the values are.

        Raises ValueError where the optimizer keeps none of them.
        """
        for name in names:
            found = self._read_state(name)
            if found is not None:
                return found.to(compute_dtype(found.dtype))
        raise ValueError(
            f"{self.site.name}: expected an optimizer that keeps {' or '.join(names)}, got one without; use another "
            "policy"
        )

    @property
    def gradient(self) -> Tensor:
        """Returns the gradient of the dense weight, zero except at the inactive blocks where its mean is largest.

        It is the sum over the micro-batches of a step and over the steps of the window, and the mean over the ranks of
        data parallelism; not clipped or corrected. There are twice as many such blocks as the most that ever grow. A
        block that was not among them in an earlier micro-batch or step lacks its part: the sum is then an estimate.
        """
        found, layout = self._gradients(), self.site.layout
        positions, order = found.positions.sort()
        mask = torch.zeros_like(self.mask).index_fill_(0, positions, True)
        return blocks.unpack(found.sums[order], mask if layout.single_weights else positions, layout)

    def gradient_means(self) -> Tensor:
        """Returns ``block_means(gradient)`` without making the dense gradient again."""
        found = self._gradients()
        means = block_means(found.sums, found.positions, self.site.layout)
        return means.new_zeros(self.site.layout.num_blocks).index_copy_(0, found.positions, means)

    @property
    def active_gradient(self) -> Tensor:
        """Returns the gradient of the values, summed and averaged like ``gradient``; for drop policies.

        It is sharded as the values are.
        """
        found = self._gradients()
        if self.half == "grow":
            raise ValueError(
                f"{self.site.name}: expected a drop policy to read active_gradient, got a grow policy; read gradient"
            )
        rows = self.site.rows
        return rows.wrap(self.site.values, found.active_sums[rows.here].contiguous())

    def _gradients(self) -> Collected:
        if self._collected is None:
            raise ValueError(
                f"{self.site.name}: expected a policy that asks for the gradient, got one that reads it without; put "
                "@smet_compile.needs_gradient above the function"
            )
        return self._collected


@dataclass(eq=False)
class GradientPolicy:
    """Is a policy that asks for the gradient; see ``needs_gradient``."""

    score: Policy
    window: int
    decay: float

    def __call__(self, site: Site, context: TopologyContext) -> Tensor:
        return self.score(site, context)


def needs_gradient(policy: Policy | None = None, *, window: int = 1, decay: float = 1.0) -> Any:
    """Marks a policy, as a decorator, as one that reads ``context.gradient`` (to grow) or ``active_gradient``.

    Args:
        window: number of steps up to the update over which gradients are added up; the manager's ``window=`` overrides
            it.
        decay: the factor by which each further step scales the sum of those before it.

    Raises:
        ValueError: an argument out of range.
    """
    window = whole_number("window", window, at_least=1)
    decay = number("decay", decay, above=0, at_most=1)
    if policy is None:
        return functools.partial(needs_gradient, window=window, decay=decay)
    score = function("needs_gradient", policy, "(site, context) → scores")
    return functools.update_wrapper(GradientPolicy(score, window, decay), score)


def magnitude(site: Site, context: TopologyContext) -> Tensor:
    """Scores by mean |w| (SET, Mocanu et al. 2018)."""
    return context.block_means(site.values)


def relative_magnitude(site: Site, context: TopologyContext) -> Tensor:
    """Scores by mean |w| over the share of 4 ΔT that the block has lived, so that young blocks may be small."""
    if context.ages is None:
        raise ValueError(
            f'{site.name}: expected an optimizer that keeps ages for drop="relative_magnitude", got one without; use '
            "ActiveAdamW, or another policy"
        )
    share = context.ages.clamp(min=1) / (4 * context.every)
    return context.block_means(site.values) / share.clamp(max=1)


@needs_gradient
def saliency(site: Site, context: TopologyContext) -> Tensor:
    """Scores by mean |w · gradient|, the first-order change of the loss (SNIP, Lee et al. 2019)."""
    return context.block_means(site.values * context.active_gradient)


def momentum(site: Site, context: TopologyContext) -> Tensor:
    """Scores by the mean magnitude of the optimizer's first moment."""
    return context.block_means(context.state("exp_avg", "momentum_buffer"))


def random(site: Site, context: TopologyContext) -> Tensor:
    """Scores by chance. As a grow policy of its own it draws tiles evenly over rows and columns, without scores."""
    if site.layout.slabs is None:
        (num_scores,) = context.scores_shape
        return torch.rand(num_scores, generator=context.generator).to(context.mask.device)
    scores = torch.zeros(site.layout.num_blocks)
    for band in bands_of(site.layout):
        band.paste_(scores, torch.rand(band.layout.num_blocks, generator=context.generator_for(band)))
    scores = scores.to(context.mask.device)
    return scores[context.mask] if context.half == "drop" else scores


@needs_gradient
def gradient(site: Site, context: TopologyContext) -> Tensor:
    """Scores by the mean |gradient| of the step (RigL, Evci et al. 2020)."""
    return context.gradient_means()


@needs_gradient(window=10, decay=0.9)
def gradient_momentum(site: Site, context: TopologyContext) -> Tensor:
    """Scores by a running mean of the gradient over ten steps (sparse momentum, Dettmers and Zettlemoyer 2019)."""
    return context.gradient_means()


DROP_POLICIES: dict[str, Policy] = {
    "magnitude": magnitude,
    "relative_magnitude": relative_magnitude,
    "saliency": saliency,
    "momentum": momentum,
    "random": random,
}
GROW_POLICIES: dict[str, Policy] = {"random": random, "gradient": gradient, "momentum": gradient_momentum}
assert set(DROP_POLICIES) == set(get_args(DropName)) and set(GROW_POLICIES) == set(get_args(GrowName))


def find_policy(argument: str, policy: str | Policy, known: Mapping[str, Policy]) -> Policy:
    """Returns the policy that a name or a function stands for. Raises ValueError for anything else."""
    if isinstance(policy, str) and policy in known:
        return known[policy]
    if not callable(policy):
        raise ValueError(
            f"{argument}: expected one of {', '.join(known)} or a function (site, context) → scores, got "
            f"{described(policy)}; pass one of these"
        )
    return policy


def name_of_policy(policy: Policy, known: Mapping[str, Policy]) -> str:
    """Returns the name of a shipped policy, or the qualified name of a function, as checkpoints keep it."""
    for name, shipped in known.items():
        if policy is shipped:
            return name
    return qualified_name(policy)


def mix_growth(shares: Mapping[GrowName | Policy, float]) -> Policy:
    """Returns a grow policy that grows a share of the blocks by each of several policies, in the order given.

    Args:
        shares: share of the growth by name or function, which add up to 1, as ``{"gradient": 0.5, "random": 0.5}``.

    Raises:
        ValueError: shares that do not add up to 1, fewer than two, or an unknown policy.
    """
    if not isinstance(shares, Mapping) or len(shares) < 2:
        raise ValueError(
            f"shares: expected a dict of two or more policies, got {described(shares)}; pass for example "
            '{"gradient": 0.5, "random": 0.5}'
        )
    parts = [(find_policy("shares", policy, GROW_POLICIES), number("shares", share, above=0, at_most=1))
             for policy, share in shares.items()]  # fmt: skip
    total = math.fsum(share for _, share in parts)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"shares: expected shares that add up to 1, got {total}; scale them")

    def mixed(site: Site, context: TopologyContext) -> Tensor:
        return _mixed_scores(parts, site, context)

    text = ", ".join(f"{name_of_policy(policy, GROW_POLICIES)} {share:g}" for policy, share in parts)
    mixed.__qualname__ = f"mix_growth({text})"
    asking = [policy for policy, _ in parts if isinstance(policy, GradientPolicy)]
    if not asking:
        return mixed
    widest = max(asking, key=lambda policy: policy.window)
    marked: Policy = needs_gradient(mixed, window=widest.window, decay=widest.decay)
    return marked


def _mixed_scores(parts: list[tuple[Policy, float]], site: Site, context: TopologyContext) -> Tensor:
    """Returns scores whose ``count`` largest are the best of each part, those of earlier parts first."""
    bands = bands_of(site.layout)
    left = [context.count // len(bands)] * len(bands) if context.counts is None else list(context.counts)
    wanted, is_free, mixed = list(left), ~context.mask, torch.zeros(context.scores_shape, device=context.mask.device)
    for number_left, (policy, share) in zip(range(len(parts), 0, -1), parts, strict=True):
        scores = check_scores(policy(site, context), context).masked_fill(~is_free, -torch.inf)
        for i, band in enumerate(bands):
            count = left[i] if number_left == 1 else min(left[i], round(share * wanted[i]))
            best = band.place(band.cut(scores).topk(count).indices)
            mixed[best], is_free[best], left[i] = float(number_left), False, left[i] - count
    order = scores.masked_fill(~is_free, -torch.inf).argsort(stable=True)
    rank = torch.empty_like(mixed).index_copy_(0, order, torch.linspace(0, 0.5, order.numel(), device=order.device))
    return torch.where(is_free, rank, mixed)


def check_scores(scores: Any, context: TopologyContext) -> Tensor:
    """Returns the scores, in a floating dtype. Raises ValueError for another shape than is asked for, and for NaN."""
    where, half = context.site.name, context.half
    if not isinstance(scores, Tensor) or tuple(scores.shape) != context.scores_shape:
        raise ValueError(
            f"{where}: expected scores of shape {context.scores_shape} from the {half} policy, got {described(scores)}"
            f"; return one score for each {'active block' if half == 'drop' else 'block'}"
        )
    here = _as_floating(local(scores.detach()))
    if here.is_complex() or bool(here.isnan().any()):
        raise ValueError(f"{where}: expected real scores from the {half} policy, got complex ones or NaN; mask them")
    if is_sharded(scores):
        here = context.site.rows.gather(here)
    return here.to(context.mask.device)


def _as_floating(scores: Tensor) -> Tensor:
    """Returns truth values and whole numbers in a floating dtype that keeps their order, up to 2**53, and others as is.

    Not every op that chooses blocks takes them, nor can a whole number be minus infinity.
    """
    if scores.is_floating_point() or scores.is_complex():
        return scores
    return scores.to(torch.float32 if scores.dtype.itemsize <= 2 else torch.float64)


def random_numbers(seed: int, step: int, name: str, purpose: str = "") -> torch.Generator:
    """Returns a generator that follows from all arguments: a resumed run draws what the undisturbed one would have."""
    text = f"{seed} {step} {name}" + (f" {purpose}" if purpose else "")
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))
