"""Rows of the table by which one launch updates many parameters, made of the arguments of their updates."""

from __future__ import annotations

import functools
import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout, empty_index, split_index
from smet_compile.format.index import blocks_per_group, num_groups
from smet_compile.ops.kernels.triton.adamw_columns import (
    BLOCK,
    BLOCKS,
    ENTRIES,
    GENERATION,
    GROUP_OF_RUNS,
    GROUP_OF_WEIGHTS,
    LANES,
)

_FIRST_OPTION = 15


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


class Facts(NamedTuple):
    """All of an update that its row is made of: equal ones make equal rows.

    Args:
        addresses: from ``VALUES`` to ``TOPOLOGY``; 0 of what there is not, and of a learning rate on the host.
        lists: address of the lists, and bytes of each of their numbers.
        layout: the arguments of a Layout; empty for a plain parameter.
        options: what follows the layout among the arguments of the update.
    """

    addresses: tuple[int, ...]
    lists: tuple[int, int]
    numel: int
    num_active: int
    num_generations: int
    coded: bool
    layout: tuple[tuple[int, ...], ...]
    options: tuple[Any, ...]


def facts_of(one: Update) -> Facts:
    scales, generation, births, topology = one.scales, one.generation, one.births, one.topology
    return Facts(
        (
            one.values.data_ptr(),
            one.grad.data_ptr(),
            one.exp_avg.data_ptr(),
            one.exp_avg_sq.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            one.num_skipped.data_ptr(),
            one.step.data_ptr(),
            one.lr.data_ptr() if one.lr.is_cuda else 0,
            0 if generation is None else generation.data_ptr(),
            0 if births is None else births.data_ptr(),
            0 if topology is None else topology.data_ptr(),
        ),
        (one.lists[0].data_ptr(), one.lists[0].element_size()) if one.lists else (0, 0),
        one.values.numel(),
        one.values.shape[0] if one.lists else 0,
        1 if births is None else births.numel(),
        scales is not None,
        (tuple(one.shape), tuple(one.matrix), tuple(one.block_shape)) if one.shape else (),
        one[_FIRST_OPTION:],
    )


class Cut(NamedTuple):
    """How a parameter is cut into what programs take at a time.

    Args:
        grid: blocks there are, rows and columns of a matrix, of its grid of blocks, and of a block.
        list_offsets: of positions and group_starts, in the lists of its index.
    """

    kind: int
    numel: int
    block_size: int
    entries_at_once: int
    num_groups: int
    grid: tuple[int, ...]
    list_offsets: tuple[int | None, int | None]

    @property
    def num_programs(self) -> int:
        if self.kind == BLOCK.value:
            return self.numel // self.block_size
        if self.kind in (ENTRIES.value, BLOCKS.value):
            return -(-self.numel // self.entries_at_once)
        return self.num_groups


@functools.lru_cache(maxsize=4096)
def cut(layout: tuple[Any, ...], numel: int, num_active: int, coded: bool, stochastic: bool) -> Cut:
    """The way of a parameter with such ``Facts``."""
    if not layout:
        return Cut(ENTRIES.value, numel, 1, LANES.value, -(-numel // LANES.value), (1,) * 7, (None, None))
    lay = Layout(*layout)
    size = math.prod(lay.block_shape)
    if lay.single_weights:
        kind = GROUP_OF_WEIGHTS if coded or stochastic else ENTRIES
    elif coded and blocks_per_group(lay) > 1:
        kind = GROUP_OF_RUNS
    else:
        kind = BLOCK if coded or size > LANES.value // 2 else BLOCKS
    grid = lay.num_blocks, *lay.matrix, lay.block_rows, lay.block_cols, *lay.block_shape
    entries_at_once = max(1, LANES.value // size) * size
    return Cut(kind.value, numel, size, entries_at_once, num_groups(lay), grid, _list_offsets(lay, num_active))


def row_of(facts: Facts, way: Cut, first_rate: int) -> tuple[int, ...]:
    """A parameter's row of the table."""
    *_, warmup_steps, shared_step, noise_seed = facts.options
    first, element_size = facts.lists
    lists = (0 if offset is None else first + offset * element_size for offset in way.list_offsets)
    wide = *facts.addresses[:4], facts.addresses[GENERATION.value]
    return (
        *facts.addresses,
        *lists,
        way.kind,
        all(address % 16 == 0 for address in wide),
        *(way.numel, way.block_size, way.entries_at_once, way.num_groups, facts.num_generations, first_rate),
        *way.grid,
        *(warmup_steps, shared_step, noise_seed or 0),
        *_bits_of_numbers(*facts.options[:5]),
    )


@functools.lru_cache
def _bits_of_numbers(
    density_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[int, ...]:
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    eps = max(eps, torch.finfo(torch.float32).tiny)
    numbers = density_rate, *logs, 1 - beta1, beta2, 1 - beta2, eps, weight_decay
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))


def _list_offsets(layout: Layout, num_active: int) -> tuple[int | None, int | None]:
    """Where positions and group_starts are in the lists of an index."""
    lists = split_index(empty_index(layout, num_active, torch.device("meta")), layout, num_active)
    return _offset(lists.positions), _offset(lists.group_starts)


def _offset(part: Tensor | None) -> int | None:
    return None if part is None else int(part.storage_offset())
