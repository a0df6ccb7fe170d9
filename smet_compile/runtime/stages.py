"""Density stages: at which steps the density of a model changes, and how many blocks each weight then has.

Densities are those of all compact weights together. Weights of one density keep to one density, rounded as ``sparsify``
rounds. Others keep their shares, the total exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from smet_compile.convert.distribution import check_density, share_out
from smet_compile.format import Layout, patterns
from smet_compile.format.arguments import described, whole_number
from smet_compile.ops import Site, find_sites

DensitySchedule = Sequence[tuple[int, float]]


class Stage(NamedTuple):
    """Says that the model has this density from the optimizer step ``step`` on."""

    step: int
    density: float


def cubic_density(
    first: float, last: float, *, begin: int = 0, end: int, num_stages: int = 5
) -> list[tuple[int, float]]:
    """Returns a density schedule that is steep at first, as gradual magnitude pruning (arXiv 1710.01878) is.

    Stage k of n is at step begin + (end - begin) k / n and has the density last + (first - last) (1 - k / n)³. So the
    model keeps the density ``first`` until the first stage, and has ``last`` from ``end`` on.

    Args:
        first: the density that the model begins with. last: that of the last stage; it may be the larger one.
        begin, end: optimizer steps.
        num_stages: n, the number of changes. Each compiles the model anew.

    Raises:
        ValueError: a density outside (0, 1], equal densities, or fewer steps than stages.
    """
    first, last = check_density("first", first), check_density("last", last)
    begin = whole_number("begin", begin, at_least=0)
    num_stages = whole_number("num_stages", num_stages, at_least=1)
    end = whole_number("end", end, at_least=begin + num_stages, advice=f"{num_stages} stages need as many steps")
    if first == last:
        raise ValueError(f"last: expected another density than first, got {last:g} twice; pass what the run ends with")
    stages = []
    for k in range(1, num_stages + 1):
        left = (1 - k / num_stages) ** 3
        stages.append((begin + (end - begin) * k // num_stages, last + (first - last) * left))
    return stages


def check_density_schedule(schedule: Any, total_steps: int | None = None) -> list[Stage]:
    """Returns the stages of a list of (step, density) pairs.

    Raises ValueError for anything else, steps out of order or beyond ``total_steps``, and densities outside (0, 1].
    """
    if isinstance(schedule, str) or not isinstance(schedule, Sequence) or not schedule:
        raise ValueError(
            f"density_schedule: expected a list of (step, density) pairs, got {described(schedule)}; pass for example "
            "[(1000, 0.5), (2000, 0.25)], or smet_compile.cubic_density(1.0, 0.25, end=2000)"
        )
    stages: list[Stage] = []
    for i, pair in enumerate(schedule):
        where = f"density_schedule[{i}]"
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{where}: expected a pair (step, density), got {described(pair)}; pass (1000, 0.5)")
        step, density = whole_number(f"{where}: step", pair[0], at_least=1), check_density(where, pair[1])
        if stages and step <= stages[-1].step:
            raise ValueError(f"{where}: expected a step after {stages[-1].step}, got {step}; put stages in order")
        if total_steps is not None and step > total_steps:
            raise ValueError(
                f"{where}: expected a step of the run, at most {total_steps}, got {step}; raise total_steps"
            )
        stages.append(Stage(step, density))
    return stages


Sizes = Mapping[str, tuple[Layout, int]]
"""Layout and number of active blocks of each weight, by name."""


def counts_at(density: float, sizes: Sizes) -> dict[str, int]:
    """Returns how many blocks of each weight are active at ``density``.

    Args:
        sizes: the weights as they are at another density.
    """
    if _have_one_density(sizes):
        return {name: layout.num_active(density) for name, (layout, _) in sizes.items()}
    caps = {name: layout.num_blocks for name, (layout, _) in sizes.items()}
    total = max(len(caps), math.floor(density * sum(caps.values()) + 0.5))
    return share_out(total, {name: count for name, (_, count) in sizes.items()}, caps)


def counts_of_stages(stages: Sequence[Stage], sizes: Sizes) -> list[dict[str, int]]:
    """Returns the numbers of active blocks before the first stage and in each. Raises ValueError where one is idle."""
    counts = [{name: count for name, (_, count) in sizes.items()}]
    for stage in stages:
        counts.append(counts_at(stage.density, sizes))
        if counts[-1] == counts[-2]:
            raise ValueError(
                f"density_schedule: expected stages that change the model, got a density of {stage.density:g} at step "
                f"{stage.step}, which it has already; leave that stage out, or take fewer"
            )
    return counts


def _have_one_density(sizes: Sizes) -> bool:
    """Tells whether one density, rounded for each weight, gives all counts."""
    low = max(0.0 if count == 1 else (count - 0.5) / layout.num_blocks for layout, count in sizes.values())
    return low < min((count + 0.5) / layout.num_blocks for layout, count in sizes.values())


class DensityStages:
    """Knows which stage comes next, and how many blocks each weight has in it.

    Args:
        schedule: the argument ``density_schedule`` of the manager; None for no stages.

    Raises:
        ValueError: as ``check_density_schedule`` does; data parallelism; no compact weights; a pattern that fixes the
            density; a stage that changes no weight, or leaves rows of blocks without any under "fan_in".
    """

    def __init__(self, schedule: DensitySchedule | None, model: nn.Module, total_steps: int) -> None:
        self.stages = [] if schedule is None else check_density_schedule(schedule, total_steps)
        self._sites = sites = find_sites(model)
        self._num_made = 0
        self._counts: list[dict[str, int]] = []
        if self.stages:
            check_one_process(model)
            _check_sites(sites)
            sizes = {name: (site.layout, site.num_active) for name, site in sites.items()}
            self._counts = counts_of_stages(self.stages, sizes)
        for stage, counts in zip(self.stages, self._counts[1:], strict=True):
            _check_rows(sites, stage, counts)

    def __bool__(self) -> bool:
        return bool(self.stages)

    @property
    def setting(self) -> list[list[float]] | None:
        """Returns the schedule as checkpoints keep it."""
        return [[stage.step, stage.density] for stage in self.stages] or None

    def next_after(self, step: int) -> int | None:
        """Returns the step after which the next stage begins, which is after ``step``; None where there is none."""
        upcoming = self.stages[self._num_made :]
        return max(upcoming[0].step, step + 1) if upcoming else None

    def find_due(self, step: int) -> Stage | None:
        """Returns the stage that the model should be in after ``step``; None where it is in it."""
        number = self._number_at(step)
        return self.stages[number - 1] if number > self._num_made else None

    def counts_of(self, stage: Stage) -> dict[str, int]:
        """Returns the number of active blocks of each weight in a stage."""
        return self._counts[self.stages.index(stage) + 1]

    def enter(self, stage: Stage) -> None:
        """Notes that the model is in this stage now."""
        self._num_made = self.stages.index(stage) + 1

    def growth_after(self, step: int) -> dict[str, int]:
        """Returns how many blocks each weight grows in the first stage after ``step``, from what it has now."""
        number = self._number_at(step) + 1
        if number > len(self.stages):
            return {}
        return {name: max(0, count - self._sites[name].num_active) for name, count in self._counts[number].items()}

    def resume(self, step: int) -> None:
        """Notes that ``step`` steps were made. If the model is not in the stage of that step, that stage is due."""
        self._num_made = self._number_at(step)
        if self.stages and any(self._sites[name].num_active != n for name, n in self._counts[self._num_made].items()):
            self._num_made = max(0, self._num_made - 1)

    def check_state(self, first: Mapping[str, int], step: int) -> None:
        """Raises ValueError where weights that began with ``first`` blocks are not in the stage of ``step`` now."""
        if not self.stages:
            return
        now = {name: site.num_active for name, site in self._sites.items()}
        for when, expected, got in (
            ("at the start", self._counts[0], first),
            (f"after step {step}", self._counts[self._number_at(step)], now),
        ):
            for name, count in expected.items():
                if got[name] != count:
                    raise ValueError(
                        f"{name}: expected {count:,} active blocks {when} by this density_schedule, got {got[name]:,}; "
                        'sparsify with the density that the run began with, or pass override=("density_schedule",)'
                    )

    def _number_at(self, step: int) -> int:
        return sum(stage.step <= step for stage in self.stages)


def _check_sites(sites: dict[str, Site]) -> None:
    if not sites:
        raise ValueError(
            "density_schedule: expected a model with compact weights, got one without; to begin dense, use "
            "sparsify(model, 1.0, dense_as_compact=True)"
        )
    for name, site in sites.items():
        if patterns.n_of_m(site.compact.pattern) is not None:
            raise ValueError(
                f'{name}: expected a pattern that leaves the density free, got "{site.compact.pattern}"; leave '
                'density_schedule out, or take pattern=None or "fan_in"'
            )


def _check_rows(sites: dict[str, Site], stage: Stage, counts: Mapping[str, int]) -> None:
    for name, site in sites.items():
        rows = site.layout.num_matrices * site.layout.block_rows
        if site.compact.pattern == patterns.FAN_IN and counts[name] < rows:
            raise ValueError(
                f'{name}: expected at least one active block in each of {rows:,} rows of blocks for "fan_in", got '
                f"{counts[name]:,} blocks at density {stage.density:g}; end with a higher one"
            )


def check_one_process(model: nn.Module) -> None:
    """Raises ValueError under data parallelism, whose buffers have the shapes that weights had at first."""
    together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if together or any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        how = f"{distributed.get_world_size()} ranks" if together else "DistributedDataParallel"
        raise ValueError(
            f"density_schedule: expected one process without data parallelism, got {how}, whose buffers for gradients "
            "have the shapes of the first density; train in one process, or checkpoint and start a run for each density"
        )
