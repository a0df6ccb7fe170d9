"""active_adamw_ for many parameters at once: one launch for all of the same dtypes, after a small one that prepares it.

The device reads addresses and numbers from a table. It is made anew, and copied, only when some of them changed.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from smet_compile.ops.kernels.triton.adamw_prepare import prepare
from smet_compile.ops.kernels.triton.adamw_rows import Shape, Update, row_of, shape_of
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
_NUM_WARPS = {True: 8, False: 4}
"""With codes, and without: as few as need no spilling of registers."""


class _Kind(NamedTuple):
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
        and (one.layout is None) == (one.generation is None)
    )


def update_all(updates: Sequence[tuple[Any, ...]]) -> None:
    """Makes every update, each the arguments of ``smet::active_adamw_``, of which ``supports`` says yes."""
    by_kind = defaultdict(list)
    for arguments in updates:
        one = Update(*arguments)
        if not one.grad.is_contiguous() or one.lr.dtype != torch.float64:
            one = one._replace(grad=one.grad.contiguous(), lr=one.lr.double())
        by_kind[kind_of(one)].append(one)
    for kind, members in by_kind.items():
        _launch(kind, members)


def kind_of(one: Update) -> _Kind:
    positions = one.lists[0].dtype if one.lists else torch.int32
    generation = torch.uint8 if one.generation is None else one.generation.dtype
    dtypes = one.values.dtype, one.grad.dtype, one.exp_avg.dtype
    return _Kind(one.values.device, dtypes, one.rounds, positions, generation)


def prepared(kind: _Kind, members: list[Update]) -> tuple[Tensor, Tensor, tuple[Shape, ...]]:
    """Table and rates of these parameters, and how each is cut; their steps are raised, and they count as changed."""
    shapes = tuple(shape_of(one, kind.stochastic) for one in members)
    rows, num_rates = [], 0
    for one, shape in zip(members, shapes, strict=True):
        rows.append(row_of(one, shape, num_rates))
        num_rates += 3 * (1 if one.births is None else one.births.numel())
    table = _table(tuple(rows), kind.device)
    rates = torch.empty(num_rates, dtype=torch.float32, device=kind.device)
    for one in members:
        changed = one.values, one.exp_avg, one.exp_avg_sq, one.num_skipped, one.step
        torch.autograd.graph.increment_version(changed if one.scales is None else (*changed, one.scales))
    prepare[(len(rows),)](table, rates, GENERATIONS=256, num_warps=1, enable_fp_fusion=False)
    return table, rates, shapes


def _launch(kind: _Kind, members: list[Update]) -> None:
    with on_device_of(members[0].values):
        table, rates, shapes = prepared(kind, members)
        work = _work(shapes, kind.device)
        kinds = {shape.kind for shape in shapes}
        if len(work):
            update[(len(work),)](
                table,
                rates,
                work,
                DTYPES=tuple(TYPES[dtype] for dtype in kind.dtypes),
                INDEX=TYPES[kind.positions],
                GENERATION=TYPES[kind.generation],
                KINDS=tuple(number in kinds for number in range(5)),
                STOCHASTIC=kind.stochastic,
                num_warps=_NUM_WARPS[kind.coded],
                enable_fp_fusion=False,
            )


@functools.lru_cache(maxsize=32)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=32)
def _work(shapes: tuple[Shape, ...], device: torch.device) -> Tensor:
    """(programs, 2) int32: the parameter, and the number of its piece."""
    counts = torch.tensor([shape.num_programs for shape in shapes])
    parameter = torch.arange(len(shapes)).repeat_interleave(counts)
    piece = torch.arange(len(parameter)) - (counts.cumsum(0) - counts)[parameter]
    return torch.stack((parameter, piece), 1).int().to(device)
