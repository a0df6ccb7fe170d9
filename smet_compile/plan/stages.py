"""Counts what a run with a density schedule stores in each stage, and which stage needs most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smet_compile.format.densities import Stage, counts_of_stages
from smet_compile.plan.run import PlannedRun, peak_of
from smet_compile.plan.stored import Bytes, bytes_text, total_bytes
from smet_compile.tables import table_lines

_COLUMNS = ("weights", "gradients", "moments", "ages", "index")


@dataclass(frozen=True)
class StagePlan:
    """Holds the cost of one stage.

    Args:
        step: the optimizer step from which on the run is in the stage; 0 for what it begins with.
        density: the density of the weights made sparse.
        stored: bytes by kind, exact.
        peak: the most bytes that tensors hold at once.
    """

    step: int
    density: float
    stored: Bytes
    peak: int

    @property
    def persistent(self) -> int:
        """Returns the bytes that are stored when a step ends, before gradients are let go."""
        return sum(self.stored.values())


def plan_stages(run: PlannedRun, stages: Sequence[Stage], batch: int) -> list[StagePlan]:
    """Returns the cost of what the run begins with, and of each stage. Raises ValueError where a stage is idle."""
    if not stages:
        return []
    sizes = {name: (site.layout, site.num_active) for name, site in run.sites.items()}
    counts, stored = counts_of_stages(stages, sizes), run.stored()
    planned = []
    for stage, active in zip((Stage(0, run.density), *stages), counts, strict=True):
        now = [replace(each, num_active=active[each.name]) if each.name in active else each for each in stored]
        total = total_bytes(now, run.recipe, run.buffers)
        peak = peak_of(total, run.timeline, run.point_with(now, batch))
        planned.append(StagePlan(*stage, total, round(peak)))
    return planned


def table_of(stages: Sequence[StagePlan]) -> str:
    """Returns a line for each stage, and says which has the highest peak."""
    rows: list[tuple[str, ...]] = [("from step", "density", *_COLUMNS, "persistent", "peak")]
    for stage in stages:
        parts = *(stage.stored[kind] for kind in _COLUMNS), stage.persistent, stage.peak
        rows.append((f"{stage.step:,}", f"{stage.density:.3g}", *map(bytes_text, parts)))
    lines = table_lines(rows, left=())
    highest = max(stages, key=lambda stage: stage.peak)
    return "\n".join([*lines, f"highest peak: {bytes_text(highest.peak)}, from step {highest.step:,}"])
