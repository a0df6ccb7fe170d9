"""Records what topology updates did: an event for each update, and which blocks were ever active or grown lately."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import count_active, spare_bits, unpack_bits
from smet_compile.ops import Site
from smet_compile.ops.loaded import check_integer, check_keys, check_names, check_number, kind_of


@dataclass(frozen=True)
class SiteEvent:
    """Describes one weight's part in an update or a density stage. All numbers but the ages count blocks.

    Args:
        num_blocks: all blocks.
        num_before: those active before.
        num_active: those active after; in an update as many as before.
        num_dropped: those dropped in this update.
        num_newcomers_dropped: of these, the ones that no earlier update could have dropped: those of the youngest
            generation that ``min_age`` does not protect.
        num_grown: those grown at the update before; 0 at the first update.
        num_surviving: of these, the ones still active.
        num_grown_earlier: those grown at the update before that.
        num_surviving_earlier: of these, the ones still active.
        num_explored: those that were ever active.
        num_moved: those active now and not at the start.
        mean_age: optimizer steps since the active blocks were grown, on average, before the update; None where the
            optimizer keeps no ages, and for weights that were loaded.
    """

    num_blocks: int
    num_before: int
    num_active: int
    num_dropped: int
    num_newcomers_dropped: int
    num_grown: int
    num_surviving: int
    num_grown_earlier: int
    num_surviving_earlier: int
    num_explored: int
    num_moved: int
    mean_age: float | None

    @property
    def churn_fraction(self) -> float:
        """Returns dropped over active before."""
        return self.num_dropped / self.num_before

    @property
    def num_added(self) -> int:
        """Returns how many blocks were grown in this update."""
        return self.num_active - self.num_before + self.num_dropped

    @property
    def newcomer_fraction(self) -> float | None:
        """Returns the share of newcomers in what was dropped; None where nothing was."""
        return _share(self.num_newcomers_dropped, self.num_dropped)

    @property
    def grown_survival_fraction(self) -> float | None:
        """Returns the share of the blocks grown at the update before that are still active; None at the first."""
        return _share(self.num_surviving, self.num_grown)

    @property
    def earlier_survival_fraction(self) -> float | None:
        """Returns the share of the blocks grown two updates before that are still active; None without any."""
        return _share(self.num_surviving_earlier, self.num_grown_earlier)

    @property
    def explored_fraction(self) -> float:
        """Returns ever active over all (the in-time over-parameterization rate of Liu et al. 2021)."""
        return self.num_explored / self.num_blocks

    @property
    def moved_fraction(self) -> float:
        """Returns the share of the active blocks that were not active at the start."""
        return self.num_moved / self.num_active


FRACTIONS = (
    "churn_fraction",
    "newcomer_fraction",
    "grown_survival_fraction",
    "earlier_survival_fraction",
    "explored_fraction",
    "moved_fraction",
)
"""The fractions that an event has for each weight, and for all weights together."""


_LOADED = "is_load"
"""A field that is saved for loads alone: older versions did not have it."""


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class TopologyEvent:
    """Describes one topology update or density stage, or the loading of weights of another density stage.

    Args:
        step: the optimizer step before it.
        drop_fraction: the share that an update asked for; 0 for a stage or a load.
        sites: each weight's part.
        density: the density of a stage, or the share of active blocks that was loaded; None for an update.
        is_load: weights with other numbers of active blocks were loaded. It may follow another event of the same step.
    """

    step: int
    drop_fraction: float
    sites: dict[str, SiteEvent]
    density: float | None = None
    is_load: bool = False

    @property
    def total(self) -> SiteEvent:
        """Returns the counts of all weights together, and the mean age of all their active blocks."""
        counts = {
            item.name: sum(getattr(site, item.name) for site in self.sites.values())
            for item in fields(SiteEvent)
            if item.name != "mean_age"
        }
        ages = [(site.mean_age, site.num_active) for site in self.sites.values() if site.mean_age is not None]
        num_with_age = sum(num_active for _, num_active in ages)
        mean_age = sum(age * num_active for age, num_active in ages) / num_with_age if ages else None
        return SiteEvent(**counts, mean_age=mean_age)

    @property
    def num_active(self) -> int:
        return self.total.num_active

    @property
    def num_dropped(self) -> int:
        return self.total.num_dropped

    @property
    def churn_fraction(self) -> float:
        """Returns dropped over active blocks, of all weights together."""
        return self.total.churn_fraction

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != _LOADED or value}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TopologyEvent:
        sites = {name: SiteEvent(**site) for name, site in saved["sites"].items()}
        return cls(saved["step"], saved["drop_fraction"], sites, saved["density"], saved.get(_LOADED, False))


def check_history(history: Any, num_steps: int, sites: Mapping[str, Site]) -> dict[str, list[int]]:
    """Returns how many blocks of each weight were active at the start, and after each of its events.

    Raises ValueError where ``history`` is not that of ``num_steps`` steps of these sites, as ``to_dict`` made it.
    """
    if not isinstance(history, list):
        raise ValueError(f"history: expected a list of events, got {type(history).__name__}")
    earliest, counts = 1, dict[str, list[int]]()
    for i, event in enumerate(history):
        where = f"history[{i}]"
        keys = [field.name for field in fields(TopologyEvent) if field.name != _LOADED]
        check_keys(where, event, keys, (_LOADED,))
        is_load = _check_is_load(where, event)
        check_integer(f"{where}.step", event["step"], earliest - is_load, num_steps)
        check_number(f"{where}.drop_fraction", event["drop_fraction"], 0, 1)
        if event["density"] is not None:
            check_number(f"{where}.density", event["density"], 0, 1)
        check_names(f"{where}.sites", event["sites"], sites.keys())
        for name, site in event["sites"].items():
            at = f"{where}.sites[{name!r}]"
            _check_site_event(at, site, sites[name].whole.num_blocks, event["density"] is not None)
            so_far = counts.setdefault(name, [site["num_before"]])
            check_integer(f"{at}.num_before", site["num_before"], so_far[-1], so_far[-1])
            so_far.append(site["num_active"])
        earliest = event["step"] + 1
    for name, site in sites.items():
        last = counts.setdefault(name, [site.num_active_in_whole])[-1]
        if last != site.num_active_in_whole:
            raise ValueError(
                f"{name}: expected a history that ends with {site.num_active_in_whole} active blocks, got {last}"
            )
    return counts


def _check_is_load(where: str, event: dict[str, Any]) -> bool:
    """Returns whether an event is a load, which has a density. It may come before any step, or after another event."""
    is_load = event.get(_LOADED, False)
    if not isinstance(is_load, bool):
        raise ValueError(f"{where}.is_load: expected True or False, got {kind_of(is_load)}; use another file")
    if is_load and event["density"] is None:
        raise ValueError(f"{where}.density: expected the density that was loaded, got None; use another file")
    return is_load


def step_of_last_load(history: list[dict[str, Any]]) -> int | None:
    """Returns the step of the last load that changed a density; None where a stage began since, or without any."""
    resizing = [event for event in history if event["density"] is not None]
    return resizing[-1]["step"] if resizing and resizing[-1].get(_LOADED, False) else None


def _check_site_event(where: str, event: Any, num_blocks: int, resizes: bool) -> None:
    check_keys(where, event, [field.name for field in fields(SiteEvent)])
    check_integer(f"{where}.num_blocks", event["num_blocks"], num_blocks, num_blocks)
    check_integer(f"{where}.num_before", event["num_before"], 1, num_blocks)
    fewest, most = (1, num_blocks) if resizes else (event["num_before"], event["num_before"])
    check_integer(f"{where}.num_active", event["num_active"], fewest, most)
    fewest = max(0, event["num_before"] - event["num_active"])
    check_integer(f"{where}.num_dropped", event["num_dropped"], fewest, event["num_before"])
    for part, whole in (
        ("num_newcomers_dropped", "num_dropped"),
        ("num_grown", "num_blocks"),
        ("num_surviving", "num_grown"),
        ("num_grown_earlier", "num_blocks"),
        ("num_surviving_earlier", "num_grown_earlier"),
        ("num_explored", "num_blocks"),
        ("num_moved", "num_active"),
    ):
        check_integer(f"{where}.{part}", event[part], 0, event[whole])
    if event["mean_age"] is not None:
        check_number(f"{where}.mean_age", event["mean_age"], 0)


class Trace:
    """Records, one bit a block on the CPU, the blocks of every weight that were active at the start, or ever, or grown.

    Under tensor parallelism every rank records those of whole weights.

    Of those grown it keeps the generations that are protected, and at least the last two.

    Args:
        min_age: optimizer steps for which a grown block is protected.
    """

    def __init__(self, sites: dict[str, Site], min_age: int) -> None:
        self._sites = sites
        self._min_age = min_age
        self._initial = {name: site.bits_of_whole(site.compact.topology).cpu().clone() for name, site in sites.items()}
        self._explored = {name: bits.clone() for name, bits in self._initial.items()}
        self._grown: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in sites}

    def protected(self, name: str, step: int) -> Tensor | None:
        """Returns the mask (num_blocks,) of the site's blocks that may not be dropped after ``step``; None for none."""
        site = self._sites[name]
        young = [bits for born, bits in self._grown[name] if step - born < self._min_age]
        if not young:
            return None
        together = functools.reduce(torch.bitwise_or, young)
        together = together if site.part is None else site.part.bits_here(together)
        return unpack_bits(together, site.layout.num_blocks).to(site.values.device)

    def record(
        self, name: str, bits_before: Tensor, bits_after: Tensor, step: int, mean_age: float | None
    ) -> SiteEvent:
        """Records an update of the site after ``step`` from bits to other bits on the CPU; returns what happened."""
        nothing = torch.zeros_like(bits_after)
        newcomers = functools.reduce(torch.bitwise_or, self._judged_first(name, step), nothing)
        event = self._event(name, bits_before, bits_after, newcomers, mean_age)
        num_before, num_active = count_active(bits_before), count_active(bits_after)
        if num_active >= num_before:
            grown = [*self._grown[name], (step, bits_after & ~bits_before)]
            self._grown[name] = [g for g in grown[:-2] if step - g[0] < self._min_age] + grown[-2:]
        return event

    def _event(
        self, name: str, bits_before: Tensor, bits_after: Tensor, newcomers: Tensor, mean_age: float | None
    ) -> SiteEvent:
        dropped, nothing = bits_before & ~bits_after, torch.zeros_like(bits_after)
        earlier, last = ([nothing, nothing] + [bits for _, bits in self._grown[name]])[-2:]
        self._explored[name] |= bits_after
        return SiteEvent(
            num_blocks=self._sites[name].whole.num_blocks,
            num_before=count_active(bits_before),
            num_active=count_active(bits_after),
            num_dropped=count_active(dropped),
            num_newcomers_dropped=count_active(dropped & newcomers),
            num_grown=count_active(last),
            num_surviving=count_active(last & bits_after),
            num_grown_earlier=count_active(earlier),
            num_surviving_earlier=count_active(earlier & bits_after),
            num_explored=count_active(self._explored[name]),
            num_moved=count_active(bits_after & ~self._initial[name]),
            mean_age=mean_age,
        )

    def follow(self, name: str, bits: Tensor, is_start: bool) -> None:
        """Records a topology of the site that was loaded, bits on the CPU, in the place of the one before.

        Blocks that were grown and are not active now are forgotten: no update dropped them.

        Args:
            is_start: the run begins with it.
        """
        if is_start:
            self._initial[name], self._explored[name] = bits.clone(), bits.clone()
        self._explored[name] |= bits
        self._grown[name] = [(born, grown & bits) for born, grown in self._grown[name]]

    def record_load(self, name: str, bits_before: Tensor, bits_after: Tensor) -> SiteEvent:
        """Records a topology with another number of active blocks that was loaded; returns what happened.

        The blocks of the start stay those of the run. Bits are on the CPU, as in ``record``.
        """
        self.follow(name, bits_after, is_start=False)
        return self._event(name, bits_before, bits_after, torch.zeros_like(bits_after), None)

    def _judged_first(self, name: str, step: int) -> list[Tensor]:
        """Returns the generations that an update after ``step`` may drop, and none before it could."""
        grown = self._grown[name]
        previous = grown[-1][0] if grown else 0
        return [
            bits
            for born, bits in grown
            if step - born >= self._min_age and (born == previous or previous - born < self._min_age)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "initial": dict(self._initial),
            "explored": dict(self._explored),
            "grown": {name: [list(generation) for generation in grown] for name, grown in self._grown.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._initial = {name: bits.cpu().clone() for name, bits in state["initial"].items()}
        self._explored = {name: bits.cpu().clone() for name, bits in state["explored"].items()}
        self._grown = {
            name: [(born, bits.cpu().clone()) for born, bits in grown] for name, grown in state["grown"].items()
        }

    def check_state_dict(self, state: Any, num_steps: int, counts: Mapping[str, list[int]]) -> None:
        """Raises ValueError where ``state`` is not that of these weights after ``num_steps`` steps.

        ``counts`` are the numbers of active blocks of each weight, from the start on.
        """
        check_keys("trace", state, ("initial", "explored", "grown"))
        for part in ("initial", "explored", "grown"):
            if not isinstance(state[part], dict):
                raise ValueError(f"trace.{part}: expected a dict by weight, got {kind_of(state[part])}")
            for name in self._sites.keys() ^ state[part].keys():
                raise ValueError(f"{name}: expected the topology history of the same weights, got that of other ones")
        for name, site in self._sites.items():
            self._check_bits(name, "initial", state["initial"][name], counts[name][0], counts[name][0])
            self._check_bits(name, "explored", state["explored"][name], site.num_active_in_whole, site.whole.num_blocks)
            self._check_grown(name, state["grown"][name], num_steps, max(counts[name]))

    def _check_grown(self, name: str, grown: Any, num_steps: int, most: int) -> None:
        if not isinstance(grown, list) or not all(isinstance(each, list) and len(each) == 2 for each in grown):
            raise ValueError(f"{name}: expected grown blocks as a list of pairs (step, bits), got {kind_of(grown)}")
        earliest = 1
        for born, bits in grown:
            check_integer(f"{name}: step of grown blocks", born, earliest, num_steps)
            self._check_bits(name, "grown", bits, 0, most)
            earliest = born + 1

    def _check_bits(self, name: str, part: str, bits: Any, at_least: int, at_most: int) -> None:
        expected, num_blocks = self._initial[name], self._sites[name].whole.num_blocks
        if not isinstance(bits, Tensor) or bits.dtype != expected.dtype or bits.shape != expected.shape:
            raise ValueError(
                f"{name}: expected a topology history of {tuple(expected.shape)} bytes, got {kind_of(bits)}; sparsify "
                "with the same block_shape"
            )
        if spare_bits(bits, num_blocks):
            raise ValueError(f"{name}: expected zeros after the bits of {part} blocks, got others; use another file")
        count = count_active(bits)
        if not at_least <= count <= at_most:
            raise ValueError(f"{name}: got {count} {part} blocks, expected from {at_least} to {at_most}")
