"""What happened at a topology update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from smet_compile.ops import Site
from smet_compile.ops.loaded import check_integer, check_keys, check_number


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
    """One topology update: after which optimizer step, which fraction was asked for, what each weight did."""

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
