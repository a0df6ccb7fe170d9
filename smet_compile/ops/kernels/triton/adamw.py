"""Implements the kernel named "triton_adamw": AdamW steps of many parameters, one launch for all of the same dtypes.

A small launch before it counts the steps and computes the rates. The device reads addresses and numbers from a table
that is made, and copied there, when the parameters change. The addresses of gradients and the learning rates are in a
table of their own, which is copied when they differ from those of the step before.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops.choose import UpdateCase
from smet_compile.ops.kernels.triton.adamw_kernels import update
from smet_compile.ops.kernels.triton.adamw_prepare import prepare
from smet_compile.ops.kernels.triton.adamw_step import (
    BLOCK,
    BLOCKS,
    ENTRIES,
    ENTRIES_OF_A_PIECE,
    GROUP_OF_RUNS,
    GROUPS,
    GROUPS_OF_WEIGHTS,
    LANES,
    RATES,
    WEIGHTS,
    Row,
)
from smet_compile.ops.kernels.triton.places import places_of
from smet_compile.ops.kernels.triton.supports import on_device
from smet_compile.ops.updates import Update

TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
_THREADS = {"num_warps": 8, "maxnreg": 128}
"""Options of a program: four entries of each thread are loaded at once, and two programs share a multiprocessor."""
_NUM_KINDS = 6
_LEAST_EPS = torch.finfo(torch.float32).tiny
_LAUNCHES, _NUMBER, _CHANGED = "triton_adamw launches", "triton_adamw number", "triton_adamw changed"
"""Keys of ``Update.prepared``: the launches of a step (kept by its first update), a number by which an update is
recognised in the next step, and the tensors that the update changes."""
_numbers = itertools.count()


def refusal(case: UpdateCase) -> str | None:
    """Says why ``update_all`` cannot make an update; None where it can."""
    one = case.update
    if one.rule.name not in ("adamw", "naive_adamw"):
        return "computes the rule adamw only"
    stored = (one.values, *one.slots)
    exp_avg, exp_avg_sq = one.slots
    is_known = (
        all(t.is_contiguous() for t in stored)
        and all(t.device == one.values.device for t in one.tensors())
        and all(t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in (one.values, one.grad))
        and exp_avg.dtype == exp_avg_sq.dtype
        and exp_avg.dtype in (torch.float32, torch.bfloat16, torch.uint8)
        and (one.topology is None) == (one.generation is None)
    )
    if is_known:
        return None
    return "does not take parameters, gradients or optimizer state of this dtype, memory layout or device"


def update_all(updates: list[Update]) -> None:
    """Makes every update, each of which ``refusal`` takes."""
    if not updates:
        return
    for launch, members in _launches_of(updates):
        launch.update(members)


class Specialization(NamedTuple):
    """Holds the properties that all parameters of one launch share, for which the kernel is compiled.

    Args:
        dtypes: dtypes of values, gradient and moments. lists, generation: dtypes of these integers.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    is_stochastic: bool
    lists: torch.dtype
    generation: torch.dtype

    @classmethod
    def of(cls, one: Update) -> Specialization:
        lists = torch.int32 if one.topology is None else one.topology.lists.dtype
        generation = torch.uint8 if one.generation is None else one.generation.dtype
        dtypes = one.values.dtype, one.grad.dtype, one.slots[0].dtype
        return cls(one.values.device, dtypes, one.rounds_stochastically, lists, generation)

    def constants(self) -> dict[str, Any]:
        """Returns the constants that all kernels here share."""
        return {
            "DTYPES": tuple(TYPES[dtype] for dtype in self.dtypes),
            "INDEX": TYPES[self.lists],
            "GENERATION": TYPES[self.generation],
            "STOCHASTIC": self.is_stochastic,
        }


class Launch:
    """Holds the tables on the device for one launch, a row for each parameter. It keeps no tensor of a parameter alive.

    Args:
        rows: the rows without ``first_rate``, which is filled in here.
    """

    def __init__(self, specialization: Specialization, rows: Sequence[Row]) -> None:
        device = specialization.device
        *first_rates, num_rates = itertools.accumulate((RATES.value * row.num_generations for row in rows), initial=0)
        rows = [row._replace(first_rate=first) for row, first in zip(rows, first_rates, strict=True)]
        self.table = _on_host([*itertools.chain(*rows)], device).to(device, non_blocking=True)
        self.step_table = torch.empty(len(rows), 3, dtype=torch.int64, device=device)
        self.rates = torch.empty(num_rates, dtype=torch.float32, device=device)
        self.work = _work(tuple(map(_num_programs, rows)), device)
        self.num_programs = len(self.work)
        kinds = {row.kind for row in rows}
        self.constants = {
            **specialization.constants(),
            "KINDS": tuple(kind in kinds for kind in range(_NUM_KINDS)),
            **_THREADS,
            "enable_fp_fusion": False,
        }
        self.specialization = specialization
        self.is_aligned = all(a % 16 == 0 for row in rows for a in (row.values, row.exp_avg, row.exp_avg_sq))
        self.device = device
        self._step_numbers: list[int] = []

    def update(self, updates: Sequence[Update]) -> None:
        """Makes the updates that the rows describe, which come in the same order."""
        kept = self.begin(updates)
        if self.num_programs:
            kernel = on_device(update, self.device)
            kernel[(self.num_programs,)](self.table, self.step_table, self.rates, self.work, **self.constants)
        del kept

    def begin(self, updates: Sequence[Update]) -> list[Tensor]:
        """Counts a step of the updates, fills ``rates``, and marks the tensors as changed for autograd.

        Returns tensors that must live until the update is launched.
        """
        numbers: list[int] = []
        kept: list[Tensor] = []
        changed: list[Tensor] = []
        lr, bits, is_address = None, 0, False
        for one in updates:
            grad = one.grad
            if not grad.is_contiguous():
                grad = grad.contiguous()
                kept.append(grad)
            if one.lr is not lr:
                lr = one.lr
                is_address = lr.is_cuda
                if is_address:
                    exact = lr.to(self.device, torch.float64)
                    kept.append(exact)
                    bits = exact.data_ptr()
                else:
                    bits = _bits(lr.item())
            numbers += (grad.data_ptr(), bits, is_address)
            changed += one.prepared[_CHANGED]
        if numbers != self._step_numbers:
            self.step_table.view(-1).copy_(_on_host(numbers, self.device), non_blocking=True)
            self._step_numbers = numbers
        torch.autograd.graph.increment_version(changed)
        on_device(prepare, self.device)[(len(updates),)](
            self.table, self.step_table, self.rates, GENERATIONS=256, num_warps=1, enable_fp_fusion=False
        )
        return kept


def launch_of_one(one: Update) -> Launch:
    """Returns the launch of an update that is made alone."""
    ((launch, _),) = _launches_of([one])
    return launch


class _Launches(NamedTuple):
    """Holds the launches of the updates with these numbers, whose gradients have these dtypes.

    Args:
        launches: each with the places of its updates among all, or None for all of them.
    """

    numbers: list[int]
    dtypes: list[torch.dtype]
    launches: list[tuple[Launch, list[int] | None]]


def _launches_of(updates: list[Update]) -> list[tuple[Launch, list[Update]]]:
    """Returns the launches of the updates, those of the step before where they are the same updates."""
    kept = updates[0].prepared.get(_LAUNCHES)
    dtypes = [one.grad.dtype for one in updates]
    if kept is None or kept.numbers != [one.prepared.get(_NUMBER) for one in updates] or kept.dtypes != dtypes:
        kept = updates[0].prepared[_LAUNCHES] = _group(updates, dtypes)
    return [
        (launch, updates if places is None else [updates[place] for place in places])
        for launch, places in kept.launches
    ]


def _group(updates: list[Update], dtypes: list[torch.dtype]) -> _Launches:
    numbers = []
    places: dict[Specialization, list[int]] = {}
    for place, one in enumerate(updates):
        number = next(_numbers)
        one.prepared[_NUMBER], one.prepared[_CHANGED] = number, one.changed()
        numbers.append(number)
        places.setdefault(Specialization.of(one), []).append(place)
    launches: list[tuple[Launch, list[int] | None]] = []
    for specialization, its_places in places.items():
        rows = tuple(row_of(updates[place], specialization.is_stochastic) for place in its_places)
        make = _launch_of_one_row if len(rows) == 1 else Launch
        launches.append((make(specialization, rows), its_places if len(places) > 1 else None))
    return _Launches(numbers, dtypes, launches)


# A compiled graph makes fused updates one by one, each time with a new Update object, so equal rows share a launch.
_launch_of_one_row = functools.lru_cache(maxsize=4096)(Launch)


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


def _num_programs(row: Row) -> int:
    if row.kind == BLOCK.value:
        return row.numel // row.block_size
    if row.kind in (ENTRIES.value, WEIGHTS.value, BLOCKS.value):
        return -(-row.numel // row.entries_at_once)
    return -(-row.num_groups // GROUPS.value) if row.kind == GROUPS_OF_WEIGHTS.value else row.num_groups


def row_of(one: Update, is_stochastic: bool) -> Row:
    """Makes a parameter's row of the table, without the place of its rates."""
    topology = one.topology
    values, exp_avg, exp_avg_sq, generation = map(_address, (one.values, *one.slots, one.generation))
    pieces = _pieces(None if topology is None else topology.layout, one.values.numel(), one.is_coded, is_stochastic)
    places = spans = None
    if is_stochastic and topology is not None and topology.layout.single_weights:
        places, spans = places_of(topology)
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
        places=_address(places),
        spans=_address(spans),
        kind=pieces.kind,
        aligned=all(address % 16 == 0 for address in (values, exp_avg, exp_avg_sq, generation)),
        numel=one.values.numel(),
        block_size=pieces.block_size,
        entries_at_once=pieces.entries_at_once,
        num_groups=pieces.num_groups,
        num_generations=1 if one.births is None else one.births.numel(),
        first_rate=0,
        warmup_steps=one.warmup_steps,
        initial_warmup_steps=one.initial_warmup_steps,
        shared_step=one.rule.shared_step,
        noise_seed=one.noise_seed or 0,
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


def _on_host(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Makes an int64 tensor that can be copied to ``device`` while the host goes on."""
    host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    return host.pin_memory() if device.type == "cuda" else host


@functools.lru_cache(maxsize=1024)
def _work(num_programs: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns (programs, 2) int32: each program's parameter, and the number of its piece."""
    counts = torch.tensor(num_programs)
    parameter = torch.arange(len(counts)).repeat_interleave(counts)
    piece = torch.arange(len(parameter)) - (counts.cumsum(0) - counts)[parameter]
    return torch.stack((parameter, piece), 1).int().to(device)
