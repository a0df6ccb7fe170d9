"""Tensors go from any layout to any other bit for bit, in as few bytes as there can be, in windows of any size."""

import random

import pytest
import torch
from torch import Tensor

import smet_compile.distributed.transfer as transfer_module
from smet_compile.distributed import Item, Placed, Region, Transfer, plan_switch
from smet_compile.distributed.transfer import WAYS
from tests.support.ranks import processes

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
SHAPES = ((7,), (13,), (6, 5), (9, 4, 3), (), (0, 4), (1, 6))


def some_layout(draw: random.Random, world: int, shape: tuple[int, ...], is_cut_by_columns: bool) -> Placed:
    """Returns a layout over some of the ranks: rows and columns cut, the rest copies, rows in any order."""
    num_rows, active = shape[0] if shape else 1, sorted(draw.sample(range(world), draw.randint(1, world)))
    by_rows = draw.choice([n for n in (1, 2, 3, 4, 5) if len(active) % n == 0])
    rest = len(active) // by_rows
    by_columns = draw.choice([n for n in (1, 2, 3) if rest % n == 0]) if is_cut_by_columns else 1
    regions = {}
    for number, rank in enumerate(active):
        row, column = number % by_rows, number // by_rows % by_columns
        ends = [min(each * -(-num_rows // by_rows), num_rows) for each in (row, row + 1)]
        if is_cut_by_columns:
            columns = [min(each * -(-shape[1] // by_columns), shape[1]) for each in (column, column + 1)]
            regions[rank] = Region(ends[0], ends[1], columns[0], columns[1])
        else:
            regions[rank] = Region(*ends)
    order = None
    if draw.random() < 0.5:
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(draw.randrange(10**6)))
    return Placed(regions, order)


def some_items(draw: random.Random, world: int) -> list[Item]:
    items = []
    for number in range(4):
        shape, dtype = draw.choice(SHAPES), draw.choice(DTYPES)
        is_wide = len(shape) > 1 and draw.random() < 0.5
        layouts = [some_layout(draw, world, shape, is_wide) for _ in range(2)]
        items.append(Item(f"tensor {number}", shape, dtype, *layouts))
    return items


def whole_of(item: Item) -> Tensor:
    """Returns the tensor with its rows in logical order."""
    size = max(1, item.num_rows) * torch.Size(item.shape[1:]).numel()
    return torch.arange(size)[: torch.Size(item.shape).numel()].to(item.dtype).view(item.shape)


def stored(item: Item, placed: Placed, rank: int) -> Tensor | None:
    if rank not in placed.regions:
        return None
    region, whole = placed.regions[rank], whole_of(item)
    if not item.shape:
        return whole.clone() if region.stop > region.start else whole.new_empty(0)
    in_order = whole if placed.order is None else whole[placed.order]
    here = in_order[region.start : region.stop]
    return (here if region.right is None else here[:, region.left : region.right]).clone()


def transitions(rank: int, world: int, count: int) -> list[str]:
    """Makes random transitions; returns what went wrong."""
    draw, found = random.Random(world), []
    for number in range(count):
        transfer_module._SMALL_BYTES = draw.choice((0, 16, 1 << 16))
        items, chunk = some_items(draw, world), draw.choice((1, 7, 64, 4096))
        plan = plan_switch(items, chunk)
        here = {item.name: stored(item, item.source, rank) for item in items}
        here = {name: tensor for name, tensor in here.items() if tensor is not None}
        arrived: dict[str, Tensor] = {}
        transfer = Transfer(items, CPU, here.get, arrived.__setitem__, here.pop, WAYS[number % 2])
        transfer.run(chunk)
        for item in items:
            wanted = stored(item, item.target, rank)
            got = arrived.get(item.name)
            same = wanted is got is None if wanted is None or got is None else torch.equal(wanted, got)
            if not same:
                found.append(f"{number} {item}")
        sent = sum(size for (sender, _), size in plan.sent.items() if sender == rank)
        if (transfer.meter.sent, plan.total_sent) != (sent, plan.lower_bound):
            found.append(f"{number}: sent {transfer.meter.sent} of {sent}, {plan.total_sent} of {plan.lower_bound}")
        if transfer.meter.peak > plan.peak.get(rank, 0):
            found.append(f"{number}: stored {transfer.meter.peak} of {plan.peak.get(rank, 0)}")
        if here:
            found.append(f"{number}: not freed: {sorted(here)}")
    return found


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_random_transitions(world: int) -> None:
    assert processes.run(world, transitions, 60) == [[]] * world


def test_a_plan_says_what_moves() -> None:
    whole, halves = Placed({0: Region(0, 8)}), Placed({0: Region(0, 4), 1: Region(4, 8)})
    plan = plan_switch([Item("w", (8, 2), torch.float32, whole, halves)])
    assert plan.sent == {(0, 1): 32} and plan.lower_bound == 32
    assert (plan.stored_before, plan.stored_after) == ({0: 64, 1: 0}, {0: 32, 1: 32})
    assert plan.seconds(16) == 2 and "0 -> 1: 32 bytes" in str(plan)


def test_a_tensor_that_lies_nowhere_is_refused() -> None:
    part, whole = Placed({0: Region(0, 4)}), Placed({1: Region(0, 8)})
    with pytest.raises(ValueError, match=r"w: expected 64 bytes for rank 1 from the ranks that store it, got 32"):
        plan_switch([Item("w", (8, 2), torch.float32, part, whole)])
