"""Makes the tables in which a launch of Triton's AdamW finds its parameters. None is written to once it is made.

A table of rows holds addresses and numbers that stay the same from step to step, so it is copied from the host once.
The addresses of gradients and rates change with the step. For many parameters they are copied from pinned memory. In a
CUDA graph no copy from the host can be repeated: there, and for one parameter alone, a kernel that takes the tensors as
arguments writes their addresses.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smet_compile.ops import captures
from smet_compile.ops.kernels.triton.adamw_rows import num_listed_groups, num_programs
from smet_compile.ops.kernels.triton.adamw_step import GRAD, LR, LR_IS_ADDRESS, NUM_STEP_COLUMNS, Row, StepRow
from smet_compile.ops.kernels.triton.supports import on_device

_AT_ONCE = 64
"""Parameters whose addresses a launch writes, each of which takes two of its arguments."""


class Tables(NamedTuple):
    """Holds the tables of a launch that its steps have in common.

    Args:
        rows: (P, columns of ``Row``) int64. work: (programs, 2) int32, each program's parameter and piece.
        groups: the same for the groups of single weights whose positions are listed.
    """

    rows: Tensor
    work: Tensor
    groups: Tensor


def copy_tables(rows: Sequence[Row], device: torch.device) -> Tables:
    """Copies the rows to the device, and lists the pieces of work. Raises RuntimeError where a graph is captured."""
    captures.refuse_in_capture(device, "tables of the parameters' addresses on the device")
    numbers = [number for row in rows for number in row]
    make = _work_of_one if len(rows) == 1 else _work
    work, groups = (make(tuple(map(count, rows)), device) for count in (num_programs, num_listed_groups))
    return Tables(_on_host(numbers, device).to(device, non_blocking=True), work, groups)


def _work(num_pieces: tuple[int, ...], device: torch.device) -> Tensor:
    counts = torch.tensor(num_pieces)
    parameter = torch.arange(len(counts)).repeat_interleave(counts)
    piece = torch.arange(len(parameter)) - (counts.cumsum(0) - counts)[parameter]
    return torch.stack((parameter, piece), 1).int().to(device)


_work_of_one = functools.lru_cache(maxsize=1024)(_work)


def step_numbers(grads: Sequence[Tensor], rates: Sequence[Tensor]) -> list[int]:
    """Returns the ``StepRow`` of each parameter, one after another. A rate is fp64 and lies on the device."""
    numbers: list[int] = []
    for grad, rate in zip(grads, rates, strict=True):
        numbers += StepRow(grad.data_ptr(), rate.data_ptr(), True)
    return numbers


def copy_step_table(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copies the numbers to the device."""
    return _on_host(numbers, device).to(device, non_blocking=True)


def write_step_table(grads: Sequence[Tensor], rates: Sequence[Tensor], device: torch.device) -> Tensor:
    """Makes the same table by launches that a CUDA graph can repeat."""
    table = torch.empty(len(grads), NUM_STEP_COLUMNS.value, dtype=torch.int64, device=device)
    for first in range(0, len(grads), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        on_device(_write_addresses, device)[(1,)](table[some], tuple(grads[some]), tuple(rates[some]), num_warps=1)
    return table


@triton.jit
def _write_addresses(table, grads, rates):
    """Writes a ``StepRow`` for each gradient and its rate."""
    for number in tl.static_range(len(grads)):
        row = table + number * NUM_STEP_COLUMNS
        tl.store(row + GRAD, grads[number].to(tl.int64))
        tl.store(row + LR, rates[number].to(tl.int64))
        tl.store(row + LR_IS_ADDRESS, 1)


def _on_host(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Makes an int64 tensor that can be copied to ``device`` while the host goes on."""
    host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    return host.pin_memory() if device.type == "cuda" else host
