"""Rows of the table by which one launch updates many parameters, made of the arguments of their updates."""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout, empty_index, split_index
from smet_compile.format.index import blocks_per_group, num_groups
from smet_compile.ops.kernels.triton.adamw_columns import (
    BLOCK,
    BLOCKS,
    ENTRIES,
    GROUP_OF_RUNS,
    GROUP_OF_WEIGHTS,
    LANES,
)


class Update(NamedTuple):
    """The arguments of ``smet::active_adamw_``; ``lists`` is its ``index``."""

    values: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor | None
    num_skipped: Tensor
    step: Tensor
    lr: Tensor
    generation: Tensor | None
    births: Tensor | None
    topology: Tensor | None
    lists: list[Tensor]
    shape: list[int]
    matrix: list[int]
    block_shape: list[int]
    density_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    warmup_steps: int
    shared_step: bool
    noise_seed: int | None

    @property
    def layout(self) -> Layout | None:
        return Layout.of_lists(self.shape, self.matrix, self.block_shape) if self.shape else None

    @property
    def rounds(self) -> bool:
        """Some of it is rounded by noise."""
        low = (torch.bfloat16, torch.uint8)
        return self.noise_seed is not None and (self.values.dtype in low or self.exp_avg.dtype in low)


class Shape(NamedTuple):
    """How a parameter is cut into what programs take at a time."""

    kind: int
    numel: int
    block_size: int
    entries_at_once: int
    num_groups: int

    @property
    def num_programs(self) -> int:
        if self.kind == BLOCK.value:
            return self.numel // self.block_size
        if self.kind in (ENTRIES.value, BLOCKS.value):
            return -(-self.numel // self.entries_at_once)
        return self.num_groups


def shape_of(update: Update, stochastic: bool) -> Shape:
    numel, layout = update.values.numel(), update.layout
    if layout is None:
        return Shape(ENTRIES.value, numel, 1, LANES.value, -(-numel // LANES.value))
    size = math.prod(layout.block_shape)
    coded, alone = update.scales is not None, blocks_per_group(layout) == 1
    if layout.single_weights:
        kind = GROUP_OF_WEIGHTS if coded or stochastic else ENTRIES
    elif coded and not alone:
        kind = GROUP_OF_RUNS
    else:
        kind = BLOCK if coded or size > LANES.value // 2 else BLOCKS
    return Shape(kind.value, numel, size, max(1, LANES.value // size) * size, num_groups(layout))


def row_of(update: Update, shape: Shape, first_rate: int) -> tuple[int, ...]:
    """A parameter's row of the table."""
    layout, moved = update.layout, update[:4]
    grid: tuple[int, ...] = (1,) * 7
    if layout:
        grid = (layout.num_blocks, *layout.matrix, layout.block_rows, layout.block_cols, *layout.block_shape)
    on_host = update.lr.device.type == "cpu"
    return (
        *(t.data_ptr() for t in moved),
        0 if update.scales is None else update.scales.data_ptr(),
        update.num_skipped.data_ptr(),
        update.step.data_ptr(),
        0 if on_host else update.lr.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (update.generation, update.births, update.topology)),
        *_list_addresses(update, layout),
        shape.kind,
        all(t.data_ptr() % 16 == 0 for t in (*moved, update.generation) if t is not None),
        *shape[1:],
        1 if update.births is None else update.births.numel(),
        first_rate,
        *grid,
        update.warmup_steps,
        update.shared_step,
        update.noise_seed or 0,
        *map(_bits, _numbers(update, float(update.lr) if on_host else 0.0)),
    )


def _numbers(update: Update, lr: float) -> tuple[float, ...]:
    beta1, beta2 = update.beta1, update.beta2
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    eps = max(update.eps, torch.finfo(torch.float32).tiny)
    return lr, update.density_rate, *logs, 1 - beta1, beta2, 1 - beta2, eps, update.weight_decay


def _bits(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _list_addresses(update: Update, layout: Layout | None) -> tuple[int, int]:
    """Of positions and group_starts."""
    if layout is None:
        return 0, 0
    index = update.lists[0]
    offsets = _list_offsets(layout, update.values.shape[0])
    first, second = (0 if o is None else index.data_ptr() + o * index.element_size() for o in offsets)
    return first, second


@functools.lru_cache(maxsize=4096)
def _list_offsets(layout: Layout, num_active: int) -> tuple[int | None, int | None]:
    lists = split_index(empty_index(layout, num_active, torch.device("meta")), layout, num_active)
    return _offset(lists.positions), _offset(lists.group_starts)


def _offset(part: Tensor | None) -> int | None:
    return None if part is None else int(part.storage_offset())
