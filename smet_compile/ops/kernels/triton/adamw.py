"""active_adamw_ for many parameters at once: one launch for all of the same dtypes, after a small one that prepares it.

The device reads addresses and numbers from a table. It is made anew, and copied, only when some of them changed.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from smet_compile.ops.kernels.triton.adamw_columns import BLOCKS
from smet_compile.ops.kernels.triton.adamw_prepare import prepare
from smet_compile.ops.kernels.triton.adamw_rows import Facts, Update, cut, facts_of, row_of
from smet_compile.ops.kernels.triton.adamw_update import update
from smet_compile.ops.kernels.triton.device import on_device_of

TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
_FEW_THREADS = {"num_warps": 4}
_MANY_THREADS = {"num_warps": 8, "maxnreg": 128}
"""Of a program that would spill registers otherwise: one with codes, or with several blocks."""


class Kind(NamedTuple):
    """What parameters have in common that one launch updates."""

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    stochastic: bool
    positions: torch.dtype
    generation: torch.dtype

    @property
    def coded(self) -> bool:
        return self.dtypes[2] == torch.uint8


def supports(arguments: tuple[Any, ...]) -> bool:
    """Whether ``update_all`` takes a parameter with these arguments of ``smet::active_adamw_``."""
    one = Update(*arguments)
    stored = (one.values, one.exp_avg, one.exp_avg_sq)
    others = (one.grad, one.scales, one.num_skipped, one.step, one.generation, one.births, one.topology, *one.lists)
    return (
        all(t.is_contiguous() for t in stored)
        and all(t is None or t.device == one.values.device for t in (*stored, *others))
        and all(t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in (one.values, one.grad))
        and one.exp_avg.dtype == one.exp_avg_sq.dtype
        and one.exp_avg.dtype in (torch.float32, torch.bfloat16, torch.uint8)
        and bool(one.shape) == (one.generation is not None)
    )


def update_all(updates: Sequence[tuple[Any, ...]]) -> None:
    """Makes every update, each the arguments of ``smet::active_adamw_``, of which ``supports`` says yes."""
    by_kind = defaultdict(list)
    for arguments in updates:
        one = Update(*arguments)
        one = readable(one._replace(grad=one.grad.contiguous()))
        by_kind[kind_of(one)].append(one)
    for kind, members in by_kind.items():
        _launch(kind, members)


def readable(one: Update) -> Update:
    """With a learning rate that the kernel can read: fp64, on the host or on the device of the weight."""
    if one.lr.dtype == torch.float64 and (not one.lr.is_cuda or one.lr.device == one.values.device):
        return one
    return one._replace(lr=one.lr.to(one.values.device if one.lr.is_cuda else one.lr.device, torch.float64))


def kind_of(one: Update) -> Kind:
    positions = one.lists[0].dtype if one.lists else torch.int32
    generation = torch.uint8 if one.generation is None else one.generation.dtype
    dtypes = one.values.dtype, one.grad.dtype, one.exp_avg.dtype
    return Kind(one.values.device, dtypes, one.rounds, positions, generation)


class Plan(NamedTuple):
    """What a launch finds on the device, a row for each parameter, and how many programs each of them takes."""

    table: Tensor
    num_rates: int
    kinds: tuple[bool, ...]
    num_programs: tuple[int, ...]


def prepared(kind: Kind, members: list[Update]) -> tuple[Plan, Tensor]:
    """The plan for these parameters, and their rates; their steps are raised, and they count as changed."""
    plan_of = _plan_of_one if len(members) == 1 else _plan_of_many
    plan = plan_of(tuple(facts_of(one) for one in members), kind)
    lrs = _on_device(tuple(0.0 if one.lr.is_cuda else float(one.lr) for one in members), torch.float64, kind.device)
    rates = torch.empty(plan.num_rates, dtype=torch.float32, device=kind.device)
    changed = [t for one in members for t in (one.values, *one[2:7]) if t is not None]
    torch.autograd.graph.increment_version(changed)
    prepare[(len(members),)](plan.table, rates, lrs, GENERATIONS=256, num_warps=1, enable_fp_fusion=False)
    return plan, rates


def _launch(kind: Kind, members: list[Update]) -> None:
    with on_device_of(members[0].values):
        plan, rates = prepared(kind, members)
        work = _work(plan.num_programs, kind.device)
        if len(work):
            update[(len(work),)](
                plan.table,
                rates,
                work,
                DTYPES=tuple(TYPES[dtype] for dtype in kind.dtypes),
                INDEX=TYPES[kind.positions],
                GENERATION=TYPES[kind.generation],
                KINDS=plan.kinds,
                STOCHASTIC=kind.stochastic,
                **(_MANY_THREADS if kind.coded or plan.kinds[BLOCKS.value] else _FEW_THREADS),
                enable_fp_fusion=False,
            )


def _make_plan(facts: tuple[Facts, ...], kind: Kind) -> Plan:
    ways = tuple(cut(one.layout, one.numel, one.num_active, one.coded, kind.stochastic) for one in facts)
    ends = itertools.accumulate((3 * one.num_generations for one in facts), initial=0)
    *first_rates, num_rates = ends
    rows = tuple(map(row_of, facts, ways, first_rates))
    kinds = {way.kind for way in ways}
    table = _on_device.__wrapped__(rows, torch.int64, kind.device)
    num_programs = tuple(way.num_programs for way in ways)
    return Plan(table, num_rates, tuple(number in kinds for number in range(5)), num_programs)


# Fused updates come one by one, as many plans as sites, step after step; those of several hold a table of many rows.
_plan_of_one = functools.lru_cache(maxsize=4096)(_make_plan)
_plan_of_many = functools.lru_cache(maxsize=256)(_make_plan)


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=1024)
def _work(num_programs: tuple[int, ...], device: torch.device) -> Tensor:
    """(programs, 2) int32: the parameter, and the number of its piece."""
    counts = torch.tensor(num_programs)
    parameter = torch.arange(len(counts)).repeat_interleave(counts)
    piece = torch.arange(len(parameter)) - (counts.cumsum(0) - counts)[parameter]
    return torch.stack((parameter, piece), 1).int().to(device)
