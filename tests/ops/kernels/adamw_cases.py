"""Makes parameters of every kind and their AdamW updates, for tests of kernels that compute them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import WEIGHTS_OF_A_GROUP, Layout, Topology
from smet_compile.ops.law import num_scales
from smet_compile.ops.rules import Rule
from smet_compile.ops.updates import Update
from smet_compile.optim.adamw import ADAMW

OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "density_rate": 2.5}
WARMUPS = {"warmup_steps": 100, "initial_warmup_steps": 150}
NO_WARMUP = {"warmup_steps": 0, "initial_warmup_steps": 0}


@dataclass(frozen=True)
class Case:
    """Describes one parameter of ``shape``, compact with blocks of ``block_shape``, or plain.

    Args:
        options: those that differ from ``OPTIONS`` and ``WARMUPS``. rule: ``ADAMW`` or ``NAIVE_ADAMW``.
    """

    shape: tuple[int, ...]
    block_shape: tuple[int, int] | None = None
    density: float = 0.4
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    rule: Rule = ADAMW

    @property
    def layout(self) -> Layout | None:
        return None if self.block_shape is None else Layout.of(self.shape, self.block_shape)


def over_the_edge(positions: Tensor, layout: Layout) -> Tensor:
    """Returns (N, bm, bn) bool: the entries that hang over, which are those whose row or column there is not."""
    bm, bn = layout.block_shape
    row = positions // layout.block_cols % layout.block_rows * bm
    col = positions % layout.block_cols * bn
    rows = row[:, None, None] + torch.arange(bm)[:, None]
    cols = col[:, None, None] + torch.arange(bn)
    return (rows >= layout.rows) | (cols >= layout.cols)


def update_of(
    case: Case, dtype: torch.dtype, moments: torch.dtype, noise_seed: int | None = 5, broken: bool = True, seed: int = 0
) -> Update:
    """Makes an update in the middle of a run; with ``broken``, some gradients are not finite."""
    generator = torch.Generator().manual_seed(seed)
    layout, positions, topology = case.layout, None, None
    size = case.shape
    if layout is not None:
        mask = torch.rand(layout.num_blocks, generator=generator) < case.density
        mask[-1] = True
        positions = mask.nonzero().squeeze(1)
        size = layout.values_shape(len(positions))
        topology = Topology.from_mask(mask, layout)

    def normal(scale: float) -> Tensor:
        x = torch.randn(size, generator=generator) * scale
        if layout is not None and positions is not None and not layout.single_weights:
            x[over_the_edge(positions, layout)] = 0
        return x

    values, grad = normal(0.1).to(dtype), normal(0.01).to(dtype)
    if broken:
        _break(grad, generator)
    exp_avg, exp_avg_sq, scales = normal(0.01), normal(0.01) ** 2, None
    if moments == torch.uint8:
        exp_avg = torch.randint(0, 256, size, generator=generator) * (exp_avg != 0)
        exp_avg_sq = torch.randint(1, 256, size, generator=generator) * (exp_avg_sq != 0)
        groups = num_scales(values.numel(), layout)
        scales = torch.rand(2, groups, generator=generator) * torch.tensor([[0.03], [0.001]])
    generation, births = None, None
    if topology is not None:
        births = torch.full((256,), -1)
        births[:4] = torch.tensor([0, 7, 90, 100])
        generation = torch.randint(0, 4, (topology.num_active,), generator=generator).to(torch.uint8)
    numbers = OPTIONS | WARMUPS | case.options
    return Update(
        rule=case.rule,
        values=values,
        grad=grad,
        slots=(exp_avg.to(moments), exp_avg_sq.to(moments)),
        scales=scales,
        num_skipped=torch.tensor(3),
        step=torch.tensor(100),
        lr=torch.tensor(0.01, dtype=torch.float64),
        generation=generation,
        births=births,
        topology=topology,
        layout=layout,
        units_are_columns=False,
        options=tuple(numbers[name] for name in case.rule.options),
        density_rate=numbers["density_rate"],
        **{name: numbers[name] for name in WARMUPS},
        noise_seed=noise_seed,
    )


def _break(grad: Tensor, generator: torch.Generator) -> None:
    flat = grad.view(-1)
    for bad in (math.inf, -math.inf, math.nan):
        flat[int(torch.randint(0, flat.numel(), (), generator=generator))] = bad


def copy_of(update: Update, device: torch.device, **changed: Any) -> Update:
    """Makes the same update in new memory, but for what is given; the learning rate stays where it is."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device, copy=True)

    topology = update.topology
    if topology is not None:
        bits, lists = topology.bits.to(device, copy=True), topology.lists.to(device, copy=True)
        topology = Topology(topology.layout, bits, lists, topology.num_active)
    fields: dict[str, Any] = {name: getattr(update, name) for name in Update.__dataclass_fields__}
    names = ("values", "grad", "scales", "num_skipped", "step", "generation", "births")
    fields |= {name: moved(fields[name]) for name in names}
    fields |= {"slots": tuple(map(moved, update.slots)), "topology": topology, "prepared": {}}
    return Update(**(fields | changed))


def shards_of(whole: Update, borders: Sequence[int]) -> list[Update]:
    """Cuts the update of a plain parameter into those of its shards, consecutive entries that begin at the borders."""
    shards = []
    for first, last in itertools.pairwise((0, *borders, whole.values.numel())):
        groups = slice(first // WEIGHTS_OF_A_GROUP, -(-last // WEIGHTS_OF_A_GROUP))
        part = dataclasses.replace(
            whole,
            values=whole.values.view(-1)[first:last],
            grad=whole.grad.view(-1)[first:last],
            slots=tuple(slot.view(-1)[first:last] for slot in whole.slots),
            scales=None if whole.scales is None else whole.scales[:, groups],
            num_skipped=torch.zeros_like(whole.num_skipped) if first else whole.num_skipped,
            first_place=whole.first_place + first,
        )
        shards.append(copy_of(part, whole.values.device))
    return shards


def joined(shards: Sequence[Update], whole: Update) -> Update:
    """Returns the update of a whole parameter, with the tensors of its shards one after another."""
    parts = [(each.values, each.grad, *each.slots) for each in shards]
    values, grad, *slots = (torch.cat(tensors).view(whole.values.shape) for tensors in zip(*parts, strict=True))
    scales = [each.scales for each in shards if each.scales is not None]
    num_skipped = torch.stack([each.num_skipped for each in shards]).sum()
    assert len({int(each.step) for each in shards}) == 1
    return dataclasses.replace(
        whole,
        values=values,
        grad=grad,
        slots=tuple(slots),
        scales=torch.cat(scales, 1) if scales else None,
        num_skipped=num_skipped,
        step=shards[0].step,
    )


SHARDED = {
    "within a span": (Case((5000,)), 0, (1025, 3333)),
    "of several spans": (Case((2, 70_000)), 0, (40_001, 100_003)),
    "from an odd place": (Case((2, 7000)), 60_003, (5001,)),
    "far away": (Case((3000,)), 2**31 + 2**16 - 701, (5, 1501)),
    "very far away": (Case((50,)), 2**48 - 11, (17,)),
}
"""Plain parameters, the place of their first entry in a larger one, and where they are cut into shards."""
SHARDED_DTYPES = {
    "bf16 with bf16 moments": (torch.bfloat16, torch.bfloat16),
    "bf16 with fp32 moments": (torch.bfloat16, torch.float32),
    "fp32 with bf16 moments": (torch.float32, torch.bfloat16),
    "fp32 with codes": (torch.float32, torch.uint8),
    "bf16 with codes": (torch.bfloat16, torch.uint8),
}


def sharded(name: str, stored: str) -> tuple[Update, list[Update]]:
    """Makes an update of ``SHARDED`` and those of its shards, which are whole groups where there are codes."""
    case, first_place, borders = SHARDED[name]
    whole = dataclasses.replace(update_of(case, *SHARDED_DTYPES[stored]), first_place=first_place)
    if whole.is_coded:
        borders = tuple(sorted({border // WEIGHTS_OF_A_GROUP * WEIGHTS_OF_A_GROUP for border in borders} - {0}))
    return whole, shards_of(whole, borders)


def tensors_of(update: Update) -> dict[str, Tensor | None]:
    """Returns the tensors that an update reads or changes, by name."""
    slots = zip((slot.name for slot in update.rule.slots), update.slots, strict=True)
    counts = {"scales": update.scales, "num_skipped": update.num_skipped, "step": update.step}
    return {"values": update.values, "grad": update.grad, **dict(slots), **counts}


def differences(actual: Update, expected: Update) -> list[str]:
    """Describes what is not the same after two updates, bit for bit, NaN for NaN."""
    found = []
    others = tensors_of(expected)
    for name, x in tensors_of(actual).items():
        y = others[name]
        if x is not None and y is not None and not torch.equal(_comparable(x), _comparable(y)):
            different = (x.cpu().double() != y.cpu().double()).nonzero()
            first = tuple(different[0].tolist())
            found.append(f"{name}: {len(different)} of {x.numel()}, first {first}: {x[first]}, expected {y[first]}")
    return found


def _comparable(x: Tensor) -> Tensor:
    return x.cpu().nan_to_num(12345.0)
