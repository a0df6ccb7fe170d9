"""Makes a parameter's row of the table that Triton's AdamW reads: its addresses, sizes and options, and its pieces."""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops.kernels.triton.adamw_step import (
    BLOCK,
    BLOCKS,
    ENTRIES,
    ENTRIES_OF_A_PIECE,
    GROUP_OF_RUNS,
    GROUPS,
    GROUPS_OF_WEIGHTS,
    LANES,
    WEIGHTS,
    Row,
)
from smet_compile.ops.updates import Update

_LEAST_EPS = torch.finfo(torch.float32).tiny


class _Pieces(NamedTuple):
    """Says how a parameter is cut into pieces, one for each program.

    Args:
        kind: the kind of piece (``ENTRIES`` and so on).
    """

    kind: int
    block_size: int
    entries_at_once: int
    num_groups: int


@functools.lru_cache(maxsize=4096)
def _pieces(layout: Layout | None, numel: int, is_coded: bool, is_stochastic: bool) -> _Pieces:
    if layout is None:
        return _Pieces(ENTRIES.value, 1, ENTRIES_OF_A_PIECE.value, -(-numel // LANES.value))
    size = math.prod(layout.block_shape)
    if layout.single_weights:
        kind = GROUPS_OF_WEIGHTS if is_coded else WEIGHTS if is_stochastic else ENTRIES
        return _Pieces(kind.value, 1, ENTRIES_OF_A_PIECE.value, layout.num_groups)
    if is_coded and layout.blocks_per_group > 1:
        kind = GROUP_OF_RUNS
    else:
        kind = BLOCK if is_coded or size > LANES.value // 2 else BLOCKS
    return _Pieces(kind.value, size, max(1, LANES.value // size) * size, layout.num_groups)


def num_programs(row: Row) -> int:
    """Returns into how many pieces the parameter of a row is cut."""
    if row.kind == BLOCK.value:
        return row.numel // row.block_size
    if row.kind in (ENTRIES.value, WEIGHTS.value, BLOCKS.value):
        return -(-row.numel // row.entries_at_once)
    return -(-row.num_groups // GROUPS.value) if row.kind == GROUPS_OF_WEIGHTS.value else row.num_groups


def num_listed_groups(row: Row) -> int:
    """Returns the number of groups of single weights whose positions a step with noise lists."""
    return row.num_groups if row.topology else 0


def row_of(one: Update, is_stochastic: bool) -> Row:
    """Makes a parameter's row of the table, without where its rates and places begin."""
    topology = one.topology
    values, exp_avg, exp_avg_sq, generation = map(_address, (one.values, *one.slots, one.generation))
    pieces = _pieces(None if topology is None else topology.layout, one.values.numel(), one.is_coded, is_stochastic)
    bits, num_blocks = None, 0
    if is_stochastic and topology is not None and topology.layout.single_weights:
        bits, num_blocks = topology.bits, topology.layout.num_blocks
    options = one.rule.named_options(one.options)
    return Row(
        values=values,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        scales=_address(one.scales),
        num_skipped=_address(one.num_skipped),
        step=_address(one.step),
        generation=generation,
        births=_address(one.births),
        positions=0 if topology is None else _address(topology.positions),
        group_starts=0 if topology is None else _address(topology.group_starts),
        topology=_address(bits),
        num_blocks=num_blocks,
        kind=pieces.kind,
        aligned=all(address % 16 == 0 for address in (values, exp_avg, exp_avg_sq, generation)),
        numel=one.values.numel(),
        block_size=pieces.block_size,
        entries_at_once=pieces.entries_at_once,
        num_groups=pieces.num_groups,
        num_generations=1 if one.births is None else one.births.numel(),
        first_rate=0,
        places_start=0,
        spans_start=0,
        warmup_steps=one.warmup_steps,
        initial_warmup_steps=one.initial_warmup_steps,
        shared_step=one.rule.shared_step,
        noise_seed=one.noise_seed or 0,
        first_place=one.first_place,
        density_rate=_bits(one.density_rate),
        log_beta1=_bits(math.log(options.beta1) if options.beta1 > 0 else -math.inf),
        log_beta2=_bits(math.log(options.beta2) if options.beta2 > 0 else -math.inf),
        rest1=_bits(1 - options.beta1),
        beta2=_bits(options.beta2),
        rest2=_bits(1 - options.beta2),
        eps=_bits(max(options.eps, _LEAST_EPS)),
        weight_decay=_bits(options.weight_decay),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=256)
def _bits(number: float) -> int:
    """Returns the bits of an fp64 number as an integer."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits
