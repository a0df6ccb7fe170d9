"""Checks that a tensor is the same in two layouts, by sums that do not depend on how it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from smet_compile.distributed.space import Item, Placed

_ROWS_BYTES = 1 << 24
"""Sums are taken over so many bytes at a time."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD, _ODDER = -7046029254386353131, -4658895280553007687  # 2^64 over the golden ratio; the first factor of splitmix64


def checksum(item: Item, placed: Placed, rank: int, here: Tensor) -> int:
    """Returns the sum of all elements that a rank stores, as integers, each times factors of its row and its column.

    Rows are counted in the whole tensor, in logical order, so that the sums of ranks that store all parts once are that
    of the whole tensor, modulo 2^64.
    """
    region, rows = placed.regions[rank], placed.logical(rank)
    if placed.order is not None:
        numbers = placed.order[region.start : region.stop]
    else:
        numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, range) else rows
    if not here.numel():
        return 0
    table = here.reshape(len(numbers), -1)
    table = table.view(_INTEGERS.get(here.dtype.itemsize, torch.uint8))
    num_columns = table.shape[1]
    left = region.left * num_columns // max(1, (region.right or 0) - region.left) if region.right is not None else 0
    of_columns = _factors(torch.arange(left, left + num_columns, device=here.device))
    of_rows = _factors(numbers.to(here.device))
    total, step = 0, max(1, _ROWS_BYTES // (8 * num_columns))
    for low in range(0, len(numbers), step):
        sums = (table[low : low + step].long() * of_columns).sum(1)
        total += int((sums * of_rows[low : low + step]).sum())
    return _wrapped(total)


def _factors(numbers: Tensor) -> Tensor:
    """Returns an odd factor for each number."""
    mixed = numbers * _ODD
    return (mixed ^ (mixed >> 31)) * _ODDER | 1


def _wrapped(total: int) -> int:
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def differing(
    items: Sequence[Item], before: Callable[[str], Tensor | None], after: Callable[[str], Tensor | None], device: Any
) -> list[str]:
    """Returns the names of items that are not the same in both layouts, on every rank; every rank has to call.

    Copies of a part are compared as well: each has to have the sum that the others have.
    """
    rank, sums = distributed.get_rank(), torch.zeros(2, len(items), dtype=torch.int64)
    for side, read in enumerate((before, after)):
        for number, item in enumerate(items):
            here, placed = read(item.name), (item.source, item.target)[side]
            if here is not None:
                sums[side, number] = checksum(item, placed, rank, here)
    on_device = sums.to(device)
    parts = [torch.empty_like(on_device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, on_device)
    tables = torch.stack(parts).cpu().tolist()
    return [item.name for number, item in enumerate(items) if not _is_same(item, number, tables)]


def _is_same(item: Item, number: int, tables: Any) -> bool:
    totals = []
    for side, placed in enumerate((item.source, item.target)):
        by_region: dict[Any, set[int]] = {}
        for rank, region in placed.regions.items():
            by_region.setdefault(region, set()).add(tables[rank][side][number])
        if any(len(sums) > 1 for sums in by_region.values()):
            return False
        totals.append(_wrapped(sum(next(iter(sums)) for sums in by_region.values())))
    return totals[0] == totals[1]
