"""Density stages: which one a run is in, and how many blocks each weight has in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from smet_compile.format import patterns
from smet_compile.format.densities import DensitySchedule, Stage, check_density_schedule, counts_of_stages
from smet_compile.ops import Site, find_sites
from smet_compile.shards import has_shards

_numbers_at_start: ContextVar[Mapping[str, int] | None] = ContextVar("numbers_at_start", default=None)


def active_blocks(model: nn.Module) -> dict[str, int]:
    """Returns the number of active blocks of each compact weight."""
    return {name: site.num_active for name, site in find_sites(model).items()}


def take_stages(model: nn.Module, is_taken: bool = True) -> None:
    """Says whether the compact weights of ``model`` take a state dict of another density stage than theirs."""
    for site in find_sites(model).values():
        site.compact.takes_stages = is_taken


@contextmanager
def begun_with(numbers: Mapping[str, int]) -> Iterator[None]:
    """Has managers that are made within know how many active blocks each weight had at the start of the run.

    It is for who makes the manager when a checkpoint of a later density stage is loaded already.
    """
    token = _numbers_at_start.set(numbers)
    try:
        yield
    finally:
        _numbers_at_start.reset(token)


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
            first = _numbers_at_start.get() or active_blocks(model)
            self._counts = counts_of_stages(self.stages, {n: (site.layout, first[n]) for n, site in sites.items()})
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

    def growth_after(self, step: int, num_steps: int = 1) -> dict[str, int]:
        """Returns how many blocks each weight grows in the next stage that the model takes, from what it has now.

        That is one that should be over at ``step``, if the model is not in it yet, or that comes in the next
        ``num_steps`` steps; else the first one after these.
        """
        number = max(self._number_made(step) + 1, self._number_at(step + num_steps))
        if number > len(self.stages):
            return {}
        return {name: max(0, count - self._sites[name].num_active) for name, count in self._counts[number].items()}

    def resume(self, step: int) -> None:
        """Notes that ``step`` steps were made. If the model is not in the stage of that step, that stage is due."""
        self._num_made = self._number_made(step)

    def check_state(self, first: Mapping[str, int], step: int, loaded_at: int | None = None) -> None:
        """Raises ValueError where weights that began with ``first`` blocks are not in the stage of ``step`` now.

        Args:
            loaded_at: the step after which weights of another stage were loaded, if no stage began since; None where
                none were. They keep their blocks until the next step, or until the first stage where none began yet.
        """
        if not self.stages:
            return
        now = {name: site.num_active for name, site in self._sites.items()}
        cases = [("at the start", self._counts[0], first)]
        if loaded_at is None or (loaded_at < step and self._number_at(step) > 0):
            cases.append((f"after step {step}", self._counts[self._number_at(step)], now))
        for when, expected, got in cases:
            for name, count in expected.items():
                if got[name] != count:
                    raise ValueError(
                        f"{name}: expected {count:,} active blocks {when} by this density_schedule, got {got[name]:,}; "
                        'sparsify with the density that the run began with, or pass override=("density_schedule",)'
                    )

    def _number_made(self, step: int) -> int:
        """Returns the number of stages that are over after ``step``, without the last of them if it is yet to come."""
        number = self._number_at(step)
        if self.stages and any(self._sites[name].num_active != n for name, n in self._counts[number].items()):
            return max(0, number - 1)
        return number

    def _number_at(self, step: int) -> int:
        return sum(stage.step <= step for stage in self.stages)


def _check_sites(sites: dict[str, Site]) -> None:
    if not sites:
        raise ValueError(
            "density_schedule: expected a model with compact weights, got one without; to begin dense, use "
            "sparsify(model, 1.0, dense_as_compact=True)"
        )
    for name, site in sites.items():
        if site.layout.num_slabs > 1:
            raise ValueError(
                f"{name}: expected a weight without slabs, got {site.layout.num_slabs}, whose numbers of active blocks "
                "have to stay equal; leave density_schedule or slabs= out"
            )
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
    """Raises ValueError under data parallelism, whose buffers have the shapes that weights had at first, and shards."""
    is_cut = has_shards(model)
    together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if together or is_cut or any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        how = "a sharded model" if is_cut else "DistributedDataParallel"
        how = f"{distributed.get_world_size()} ranks" if together else how
        raise ValueError(
            f"density_schedule: expected one process without data parallelism, got {how}, whose buffers for gradients "
            "have the shapes of the first density; train in one process, or checkpoint and start a run for each density"
        )
