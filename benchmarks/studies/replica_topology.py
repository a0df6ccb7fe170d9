"""Changes the topology of one linear weight of one replica: what is dropped, what is grown, and what is counted.

Weights are dense here, so an update is a change of a mask. The rules are those of `smet_compile.runtime.update`, with
the additions that the study compares. Shape suffixes: M and K rows and columns of blocks, R and C of weights.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.studies.replica import Replica
from smet_compile.format import Layout, all_block_means, positions_of, sample_evenly, sample_positions

_UPDATES_TO_MATURE = 4  # after which "relative" compares magnitudes as they are


@dataclass
class Movement:
    """Counts blocks over a run, all weights together.

    Args:
        dropped, grown: in all updates. judged: grown blocks that came to the first update at which they might be
            dropped. dropped_at_first: those of them that it dropped.
        newly_active: active at the end and not at the start. active: at the end. explored: ever active. blocks: all.
    """

    dropped: int = 0
    grown: int = 0
    judged: int = 0
    dropped_at_first: int = 0
    newly_active: int = 0
    active: int = 0
    explored: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Reading:
    """Holds what an update may look at, as dense matrices (R, C): weight, first moment, summed gradient if there is."""

    weight: Tensor
    first: Tensor
    gradient: Tensor | None


@dataclass(frozen=True)
class Grid:
    """Cuts a matrix into blocks, after a change of the order of its rows and columns if there is one."""

    layout: Layout
    rows: Tensor | None = None
    cols: Tensor | None = None

    @classmethod
    def of(cls, case: Replica, name: str, shape: torch.Size) -> Grid:
        layout = Layout.of(shape, case.block_shape)
        if not case.permuted:
            return cls(layout)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{case.drawn_from} {name} order".encode()))
        return cls(layout, *(torch.randperm(size, generator=generator) for size in layout.matrix))

    def means(self, dense: Tensor) -> Tensor:
        """Returns the mean magnitude (M K) of every block of a matrix (R, C)."""
        if self.rows is not None:
            dense = dense[self.rows][:, self.cols]
        return all_block_means(dense, self.layout)

    def spread(self, of_blocks: Tensor) -> Tensor:
        """Returns a matrix (R, C) of which every entry has the number of its block, from numbers (M K)."""
        rows, cols = self.layout.matrix
        height, width = self.layout.block_shape
        table_MK = of_blocks.view(self.layout.block_rows, self.layout.block_cols)
        regular = table_MK.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :cols]
        if self.rows is None:
            return regular
        dense = torch.empty_like(regular)
        dense[self.rows[:, None], self.cols] = regular
        return dense


@dataclass
class Topology:
    """Holds which blocks of a weight are active, and the steps after which they were grown (0: from the start)."""

    case: Replica
    name: str
    grid: Grid
    active: Tensor
    births: Tensor
    _carried: float = 0.0
    _first: Tensor = field(init=False)
    _explored: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._first, self._explored = self.active.clone(), self.active.clone()

    @classmethod
    def draw(cls, case: Replica, name: str, shape: torch.Size) -> Topology:
        """Draws the blocks that start active, as `sparsify` does."""
        grid = Grid.of(case, name, shape)
        active = torch.zeros(grid.layout.num_blocks, dtype=torch.bool)
        count = grid.layout.num_active(case.density)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{case.drawn_from} {name}".encode()))
        if grid.layout.tiles or case.pattern == "fan_in":
            active[sample_evenly(active, active, grid.layout, count, generator)] = True
        else:
            active[sample_positions(active, count, generator)] = True
        return cls(case, name, grid, active, torch.zeros(active.shape, dtype=torch.int32))

    @property
    def density(self) -> float:
        return int(self.active.sum()) / self.active.numel()

    def update(self, step: int, reading: Reading, movement: Movement) -> Tensor:
        """Drops and grows blocks after step ``step``; returns which ones changed (M K)."""
        before = self.active.clone()
        ages = step - self.births
        dropped = self._choose_dropped(step, ages, reading)
        grown = self._choose_grown(before, dropped, step, reading)
        self._count(movement, ages, dropped)
        self.active[dropped] = False
        self.active[grown] = True
        self.births[grown] = step
        self._explored |= self.active
        changed = torch.zeros_like(before)
        changed[dropped] = changed[grown] = True
        return changed

    def _drop_fraction(self, step: int) -> float:
        case = self.case
        decay = (1 + math.cos(math.pi * min(1.0, step / case.stop_step))) / 2
        return case.final_drop_fraction + (case.drop_fraction - case.final_drop_fraction) * decay

    def _num_to_drop(self, step: int, num_active: int) -> int:
        amount = self._drop_fraction(step) * num_active + self._carried
        if self.case.accumulate_counts:
            self._carried = amount - math.floor(amount)
        return math.floor(amount)

    def _choose_dropped(self, step: int, ages: Tensor, reading: Reading) -> Tensor:
        """Returns the positions of the active blocks of least score, without those that are too young."""
        positions = positions_of(self.active)
        scores = self._drop_scores(ages, reading)[positions]
        young = ((self.births > 0) & (ages < self.case.min_age))[positions]
        scores = scores.masked_fill(young, torch.inf)
        count = min(self._num_to_drop(step, len(positions)), int((~young).sum()), int((~self.active).sum()))
        return positions[scores.topk(count, largest=False, sorted=False).indices]

    def _drop_scores(self, ages: Tensor, reading: Reading) -> Tensor:
        rule, means = self.case.drop, self.grid.means
        if rule == "saliency":
            assert reading.gradient is not None
            return means(reading.weight * reading.gradient)
        if rule == "momentum":
            return means(reading.first)
        magnitude = means(reading.weight)
        if rule == "relative":
            return magnitude / (ages / (_UPDATES_TO_MATURE * self.case.every)).clamp(max=1.0)
        return magnitude

    def _choose_grown(self, before: Tensor, dropped: Tensor, step: int, reading: Reading) -> Tensor:
        """Returns the positions of as many blocks as are dropped, none of which was active before."""
        layout, count = self.grid.layout, len(dropped)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.case.drawn_from} {step} {self.name}".encode()))
        is_random = self.case.grow == "random"
        if is_random and self.case.pattern is None:
            if not layout.tiles:
                return sample_positions(before, count, generator)
            kept = before.clone()
            kept[dropped] = False
            return sample_evenly(kept, before, layout, count, generator)
        if is_random:
            scores = torch.rand(before.shape, generator=generator)
        else:
            assert reading.gradient is not None
            scores = self.grid.means(reading.gradient)
        scores = scores.masked_fill(before, -1.0)
        return scores.topk(count).indices if self.case.pattern is None else _best_of_rows(scores, dropped, layout)

    def _count(self, movement: Movement, ages: Tensor, dropped: Tensor) -> None:
        """Counts what is dropped, before it is. At its first judgement a block is as old as the first update after
        ``min_age``."""
        case = self.case
        first_age = case.every * max(1, math.ceil(case.min_age / case.every))
        judged = (self.births > 0) & (ages == first_age) & self.active
        movement.dropped += len(dropped)
        movement.grown += len(dropped)
        movement.judged += int(judged.sum())
        movement.dropped_at_first += int(judged[dropped].sum())

    def finish(self, movement: Movement) -> None:
        """Counts what only the end of the run shows."""
        movement.newly_active += int((self.active & ~self._first).sum())
        movement.active += int(self.active.sum())
        movement.explored += int(self._explored.sum())
        movement.blocks += self.active.numel()


def _best_of_rows(scores: Tensor, dropped: Tensor, layout: Layout) -> Tensor:
    """Returns the positions of largest score, in every row of blocks as many as the row has dropped."""
    wanted_M = torch.bincount(dropped // layout.block_cols, minlength=layout.block_rows)
    order_MK = scores.view(layout.block_rows, layout.block_cols).argsort(1, descending=True)
    first_MK = torch.arange(layout.block_cols) < wanted_M[:, None]
    rows_M1 = torch.arange(layout.block_rows)[:, None] * layout.block_cols
    return (rows_M1 + order_MK)[first_MK]
