"""Implements the kernel named "triton_adamw": AdamW steps of many parameters, one launch for all of the same dtypes.

A small launch before it counts the steps and computes the rates. The device reads addresses and numbers from tables
(``adamw_tables``). A CUDA graph can capture a step once the same parameters have made one before.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from smet_compile.ops import captures
from smet_compile.ops.choose import UpdateCase
from smet_compile.ops.kernels.triton.adamw_kernels import update
from smet_compile.ops.kernels.triton.adamw_prepare import prepare
from smet_compile.ops.kernels.triton.adamw_rows import num_programs, row_of
from smet_compile.ops.kernels.triton.adamw_step import ENTRIES_OF_A_PIECE, RATES, Row
from smet_compile.ops.kernels.triton.adamw_tables import (
    Tables,
    copy_step_table,
    copy_tables,
    step_numbers,
    write_step_table,
)
from smet_compile.ops.kernels.triton.places import list_places, with_list_starts
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


def prepare_update(one: Update) -> None:
    """Makes the tables of an update that is made alone, outside a graph in whose memory they must not lie."""
    launch_of_one(one).make_tables()


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


class Step(NamedTuple):
    """Holds what a begun step gives to the kernel, and must live until that is launched.

    Args:
        rates: fp32, step sizes and bias corrections. kept: gradients and learning rates that were copied.
    """

    tables: Tables
    step_table: Tensor
    rates: Tensor
    kept: list[Tensor]


class Launch:
    """Makes the updates of some parameters by one launch. It keeps no tensor of a parameter alive.

    Args:
        rows: the rows without ``first_rate``, which is filled in here.
    """

    def __init__(self, specialization: Specialization, rows: Sequence[Row]) -> None:
        sizes = (RATES.value * row.num_generations for row in rows)
        *first_rates, self._num_rates = itertools.accumulate(sizes, initial=0)
        rows, self._num_places = with_list_starts(rows)
        self._rows = tuple(row._replace(first_rate=first) for row, first in zip(rows, first_rates, strict=True))
        self.num_programs = sum(map(num_programs, rows))
        kinds = {row.kind for row in rows}
        self.constants = {
            **specialization.constants(),
            "KINDS": tuple(kind in kinds for kind in range(_NUM_KINDS)),
            "CROSS": any(row.first_place % ENTRIES_OF_A_PIECE.value for row in rows),
            **_THREADS,
            "enable_fp_fusion": False,
        }
        self.specialization = specialization
        self.is_aligned = all(a % 16 == 0 for row in rows for a in (row.values, row.exp_avg, row.exp_avg_sq))
        self.device = specialization.device
        self._tables: Tables | None = None
        self._step_numbers: list[int] = []
        self._step_table: Tensor | None = None

    def update(self, updates: Sequence[Update]) -> None:
        """Makes the updates that the rows describe, which come in the same order."""
        step = self.begin(updates)
        if self.num_programs:
            kernel = on_device(update, self.device)
            tables, index = step.tables, self.constants["INDEX"]
            listed = list_places(tables.rows, tables.groups, self._num_places, self.device, index)
            kernel[(self.num_programs,)](
                tables.rows, step.step_table, step.rates, *listed, tables.work, **self.constants
            )
        del step

    def make_tables(self) -> Tables:
        """Returns the tables that all steps read. The first call copies them from the host."""
        if self._tables is None:
            make = _tables_of_one_row if len(self._rows) == 1 else copy_tables
            self._tables = make(self._rows, self.device)
        return self._tables

    def begin(self, updates: Sequence[Update]) -> Step:
        """Counts a step of the updates, computes its rates, and marks the tensors as changed for autograd."""
        tables, kept = self.make_tables(), []
        grads, lrs = [one.grad for one in updates], [one.lr for one in updates]
        for place, grad in enumerate(grads):
            if not grad.is_contiguous():
                grads[place] = grad.contiguous()
                kept.append(grads[place])
        if any(lr.dtype != torch.float64 or lr.device != self.device for lr in lrs):
            lrs = self._exact(lrs)
            kept += lrs
        step_table = self._find_step_table(grads, lrs)
        if captures.is_capturing(self.device):
            captures.note([one.values for one in updates], tables)
        else:
            self._use_on_this_stream(*tables, step_table)
        rates = torch.empty(self._num_rates, dtype=torch.float32, device=self.device)
        torch.autograd.graph.increment_version(list(itertools.chain(*(one.prepared[_CHANGED] for one in updates))))
        on_device(prepare, self.device)[(len(updates),)](
            tables.rows, step_table, rates, GENERATIONS=256, num_warps=1, enable_fp_fusion=False
        )
        return Step(tables, step_table, rates, kept)

    def _exact(self, lrs: Sequence[Tensor]) -> list[Tensor]:
        """Returns the learning rates in fp64 on the device; those that are one tensor stay one."""
        if any(not lr.is_cuda for lr in lrs):
            captures.refuse_to_wait(self.device, "lr on the CPU", f"pass a tensor on {self.device}")
        exact = {id(lr): lr.to(self.device, torch.float64) for lr in lrs}
        return [exact[id(lr)] for lr in lrs]

    def _find_step_table(self, grads: list[Tensor], lrs: list[Tensor]) -> Tensor:
        """Returns the table of the addresses of this step, that of the step before where they are the same.

        The first is written by the kernel that a capture needs, since none may be loaded in a capture.
        """
        if len(grads) == 1 or captures.is_capturing(self.device):
            return write_step_table(grads, lrs, self.device)
        numbers = step_numbers(grads, lrs)
        if self._step_table is None:
            self._step_numbers, self._step_table = numbers, write_step_table(grads, lrs, self.device)
        elif numbers != self._step_numbers:
            self._step_numbers, self._step_table = numbers, copy_step_table(numbers, self.device)
        return self._step_table

    def _use_on_this_stream(self, *tables: Tensor) -> None:
        """Keeps the memory of tables that another stream made from being used again before this stream is done."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for table in tables:
                table.record_stream(stream)


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
_tables_of_one_row = functools.lru_cache(maxsize=4096)(copy_tables)
