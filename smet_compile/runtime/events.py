"""What happened at a topology update."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
