"""One topology update of a weight: choosing the blocks to drop and to grow, moving them, recording what happened.

Data-parallel ranks must hold one topology, so they agree on the chosen blocks before they change it. Every rank makes
the same calls in the same order; without ``torch.distributed`` they return what they are given.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, distributed

from smet_compile.format import (
    TopologyChange,
    block_means,
    count_active,
    pack_bits,
    positions_of,
    sample_evenly,
    sample_positions,
    spare_bits,
)
from smet_compile.ops import Site
from smet_compile.ops.loaded import check_integer, check_keys, check_number, kind_of
from smet_compile.ops.sinks import NO_GRADIENT
from smet_compile.runtime.managed_optimizers import StateToMove


def drop_smallest(site: Site, mask: Tensor, count: int) -> Tensor:
    """Returns the positions (count,) of the active blocks of least mean |w| (Mocanu et al. 2018)."""
    positions = positions_of(mask)
    scores = block_means(site.values.detach(), positions, site.layout)
    return positions[scores.topk(count, largest=False, sorted=False).indices]


def grow_random(site: Site, mask: Tensor, dropped: Tensor, seed: int, step: int) -> Tensor:
    """Returns the positions of as many inactive blocks as ``dropped``, none of which was just dropped.

    They are uniform (SET, Mocanu et al. 2018), or for tiles in the emptiest rows and columns of tiles. They are a
    function of topology, seed, step and name alone: a resumed run draws what the undisturbed one would have drawn.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {step} {site.name}".encode()))
    if not site.layout.tiles:
        return sample_positions(mask, dropped.numel(), generator)
    kept = mask.clone()
    kept[dropped] = False
    return sample_evenly(kept, mask, site.layout, dropped.numel(), generator)


class GradientCandidates:
    """Finds the inactive blocks of one site whose gradient is largest, for RigL's growth (Evci et al. 2020).

    While attached, the backward of the weight scores its inactive blocks and keeps the positions of the best: one
    layer's dense gradient at a time. Each backward replaces what an earlier one found, so under gradient accumulation
    the last micro-batch decides. The gradients are those before clipping or any other correction.

    Args:
        max_count: the most that will ever be taken. It fixes the shape of the buffer, and so a compiled graph.
    """

    def __init__(self, site: Site, max_count: int) -> None:
        self.site = site
        self.max_count = max(1, max_count)

    def attach(self) -> None:
        self.site.compact.candidates = torch.full((self.max_count,), NO_GRADIENT, device=self.site.values.device)

    def detach(self) -> None:
        self.site.compact.candidates = None

    def take(self, count: int) -> Tensor | None:
        """Returns the ``count`` best candidates, best first; None where no gradient came."""
        candidates = self.site.compact.candidates
        if candidates is None or candidates[0] == NO_GRADIENT:
            return None
        return candidates[:count]


def agree_on_positions(positions: Tensor) -> Tensor:
    """Returns the positions of rank 0, on every rank; their number is the same everywhere."""
    if not _is_alone():
        distributed.broadcast(positions, src=0)
    return positions


def agree_on_ready(ready: list[bool], device: torch.device) -> list[bool]:
    """Returns for each weight, all on ``device``, whether every rank is ready to change it."""
    if _is_alone():
        return ready
    on_cpu = distributed.get_backend() != "nccl"
    flags = torch.tensor(ready, dtype=torch.int32, device="cpu" if on_cpu else device)
    distributed.all_reduce(flags, distributed.ReduceOp.MIN)
    return [bool(flag) for flag in flags.tolist()]


def _is_alone() -> bool:
    together = distributed.is_available() and distributed.is_initialized()
    return not together or distributed.get_world_size() == 1


def move(site: Site, before: Tensor, dropped: Tensor, grown: Tensor, state: StateToMove) -> Tensor:
    """Drops and grows the blocks at the given positions, as many of each; returns the new mask.

    Values, gradient, topology and optimizer state change in place.

    Args:
        before: the mask of active blocks.
        state: the optimizer state that follows.
    """
    after = before.clone()
    after[dropped] = False
    after[grown] = True
    change = TopologyChange.between(site.values, before, after)
    change.remap_(site.values)
    if site.values.grad is not None:
        change.remap_(site.values.grad)
    site.compact.set_mask(after)
    state.follow(site, change)
    return after


@dataclass(frozen=True)
class SiteEvent:
    """One weight's part in an update.

    Args:
        num_active, num_dropped: blocks; as many are grown as are dropped.
        churn_fraction: dropped over active.
        grown_survival_fraction: of the blocks grown at the update before, those still active; None at the first.
        mean_age: steps since the active blocks were grown, on average, before the update; None where the
            optimizer keeps no ages.
        explored_fraction: blocks that have ever been active, of all (the in-time over-parameterization rate of
            Liu et al. 2021).
    """

    num_active: int
    num_dropped: int
    churn_fraction: float
    grown_survival_fraction: float | None
    mean_age: float | None
    explored_fraction: float


@dataclass(frozen=True)
class TopologyEvent:
    """One topology update: the optimizer step it came after, the fraction it asked for, and each weight's part."""

    step: int
    drop_fraction: float
    sites: dict[str, SiteEvent]

    @property
    def num_active(self) -> int:
        return sum(site.num_active for site in self.sites.values())

    @property
    def num_dropped(self) -> int:
        return sum(site.num_dropped for site in self.sites.values())

    @property
    def churn_fraction(self) -> float:
        """Dropped over active blocks, of all weights together."""
        return self.num_dropped / self.num_active

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TopologyEvent:
        sites = {name: SiteEvent(**site) for name, site in saved["sites"].items()}
        return cls(saved["step"], saved["drop_fraction"], sites)


def check_history(history: Any, num_steps: int, sites: Mapping[str, Site]) -> None:
    """Raises ValueError where ``history`` is not that of ``num_steps`` steps of these sites, as ``to_dict`` made it."""
    if not isinstance(history, list):
        raise ValueError(f"history: expected a list of events, got {type(history).__name__}")
    earliest = 1
    for i, event in enumerate(history):
        where = f"history[{i}]"
        check_keys(where, event, [field.name for field in fields(TopologyEvent)])
        check_integer(f"{where}.step", event["step"], earliest, num_steps)
        check_number(f"{where}.drop_fraction", event["drop_fraction"], 0, 1)
        check_keys(f"{where}.sites", event["sites"], (), sites.keys())
        for name, site in event["sites"].items():
            _check_site_event(f"{where}.sites[{name!r}]", site, sites[name])
        earliest = event["step"] + 1


def _check_site_event(where: str, event: Any, site: Site) -> None:
    check_keys(where, event, [field.name for field in fields(SiteEvent)])
    check_integer(f"{where}.num_active", event["num_active"], site.num_active, site.num_active)
    check_integer(f"{where}.num_dropped", event["num_dropped"], 0, site.num_active)
    check_number(f"{where}.churn_fraction", event["churn_fraction"], 0, 1)
    check_number(f"{where}.explored_fraction", event["explored_fraction"], 0, 1)
    if event["grown_survival_fraction"] is not None:
        check_number(f"{where}.grown_survival_fraction", event["grown_survival_fraction"], 0, 1)
    if event["mean_age"] is not None:
        check_number(f"{where}.mean_age", event["mean_age"], 0)


class Trace:
    """Records which blocks of every site were ever active and which were grown last, one bit each, on the CPU."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self._sites = sites
        self._explored = {name: site.compact.topology.cpu().clone() for name, site in sites.items()}
        self._grown: dict[str, Tensor] = {}

    def record(self, name: str, before: Tensor, after: Tensor, mean_age: float | None) -> SiteEvent:
        """Records an update of the site from one mask to another, and returns what happened."""
        bits_before, bits_after = pack_bits(before).cpu(), pack_bits(after).cpu()
        grown_before = self._grown.get(name)
        num_grown_before = 0 if grown_before is None else count_active(grown_before)
        survival = None
        if grown_before is not None and num_grown_before > 0:
            survival = count_active(grown_before & bits_after) / num_grown_before
        self._grown[name] = bits_after & ~bits_before
        self._explored[name] |= bits_after
        num_active, num_dropped = count_active(bits_before), count_active(bits_before & ~bits_after)
        return SiteEvent(
            num_active=num_active,
            num_dropped=num_dropped,
            churn_fraction=num_dropped / num_active,
            grown_survival_fraction=survival,
            mean_age=mean_age,
            explored_fraction=count_active(self._explored[name]) / self._sites[name].layout.num_blocks,
        )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"explored": dict(self._explored), "grown": dict(self._grown)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._explored = {name: bits.cpu().clone() for name, bits in state["explored"].items()}
        self._grown = {name: bits.cpu().clone() for name, bits in state["grown"].items()}

    def check_state_dict(self, state: Any) -> None:
        """Raises ValueError where ``state`` is not that of these weights."""
        check_keys("trace", state, ("explored", "grown"))
        for part in ("explored", "grown"):
            if not isinstance(state[part], dict):
                raise ValueError(f"trace.{part}: expected a dict of bits, got {kind_of(state[part])}")
        for name in self._sites.keys() ^ state["explored"].keys() | state["grown"].keys() - self._sites.keys():
            raise ValueError(f"{name}: expected the topology history of the same weights, got that of other ones")
        for part in ("explored", "grown"):
            for name, bits in state[part].items():
                self._check_bits(name, part, bits)

    def _check_bits(self, name: str, part: str, bits: Any) -> None:
        expected, site = self._explored[name], self._sites[name]
        if not isinstance(bits, Tensor) or bits.dtype != expected.dtype or bits.shape != expected.shape:
            raise ValueError(
                f"{name}: expected a topology history of {tuple(expected.shape)} bytes, got {kind_of(bits)}; sparsify "
                "with the same block_shape"
            )
        if spare_bits(bits, site.layout.num_blocks):
            raise ValueError(f"{name}: expected zeros after the bits of {part} blocks, got others; use another file")
        count = count_active(bits)
        too_few, too_many = part == "explored" and count < site.num_active, part == "grown" and count > site.num_active
        if too_few or too_many:
            raise ValueError(f"{name}: got {count} {part} blocks, where {site.num_active} are active")
