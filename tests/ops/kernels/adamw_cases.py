"""Parameters of every kind and their updates, for tests of kernels that make them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Layout, empty_index, num_groups, pack_bits, write_index

NUM_SKIPPED, STEP, LAST_TENSOR = 5, 6, 7


@dataclass(frozen=True)
class Case:
    """One parameter: of ``shape``, compact with blocks of ``block_shape``, or plain."""

    shape: tuple[int, ...]
    block_shape: tuple[int, int] | None = None
    density: float = 0.4
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def layout(self) -> Layout | None:
        return None if self.block_shape is None else Layout.of(self.shape, self.block_shape)


def over_the_edge(positions: Tensor, layout: Layout) -> Tensor:
    """(N, bm, bn) bool: the entries that hang over, which are those whose row or column there is not."""
    bm, bn = layout.block_shape
    row = positions // layout.block_cols % layout.block_rows * bm
    col = positions % layout.block_cols * bn
    rows = row[:, None, None] + torch.arange(bm)[:, None]
    cols = col[:, None, None] + torch.arange(bn)
    return (rows >= layout.rows) | (cols >= layout.cols)


def update_of(
    case: Case, dtype: torch.dtype, moments: torch.dtype, noise_seed: int | None = 5, broken: bool = True, seed: int = 0
) -> tuple[Any, ...]:
    """The arguments of an update in the middle of a run; with ``broken``, some gradients are not finite."""
    generator = torch.Generator().manual_seed(seed)
    layout, positions = case.layout, None
    size = case.shape
    if layout is not None:
        mask = torch.rand(layout.num_blocks, generator=generator) < case.density
        mask[-1] = True
        positions = mask.nonzero().squeeze(1)
        size = layout.values_shape(len(positions))

    def normal(scale: float) -> Tensor:
        x = torch.randn(size, generator=generator) * scale
        if layout is not None and not layout.single_weights:
            x[over_the_edge(positions, layout)] = 0
        return x

    values, grad = normal(0.1).to(dtype), normal(0.01).to(dtype)
    if broken:
        _break(grad, generator)
    exp_avg, exp_avg_sq, scales = normal(0.01), normal(0.01) ** 2, None
    if moments == torch.uint8:
        exp_avg = torch.randint(0, 256, size, generator=generator) * (exp_avg != 0)
        exp_avg_sq = torch.randint(1, 256, size, generator=generator) * (exp_avg_sq != 0)
        groups = layout.num_groups if layout else -(-values.numel() // 1024)
        scales = torch.rand(2, groups, generator=generator) * torch.tensor([[0.03], [0.001]])
    compact: tuple[Any, ...] = (None, None, None, [], [], [], [])
    if layout is not None:
        births = torch.full((256,), -1)
        births[:4] = torch.tensor([0, 7, 90, 100])
        generation = torch.randint(0, 4, (len(positions),), generator=generator).to(torch.uint8)
        topology = pack_bits(mask)
        index = empty_index(layout, len(positions), torch.device("cpu"))
        write_index(index, topology, layout)
        lists = list(layout.shape), list(layout.matrix), list(layout.block_shape)
        compact = (generation, births, topology, [index], *lists)
    options = {
        "density_rate": 2.5,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "warmup_steps": 100,
        "shared_step": False,
        **case.options,
    }
    counts = torch.tensor(3), torch.tensor(100)
    lr = torch.tensor(0.01, dtype=torch.float64)
    moved = values, grad, exp_avg.to(moments), exp_avg_sq.to(moments), scales
    return (*moved, *counts, lr, *compact, *options.values(), noise_seed)


def _break(grad: Tensor, generator: torch.Generator) -> None:
    flat = grad.view(-1)
    for bad in (float("inf"), float("-inf"), float("nan")):
        flat[int(torch.randint(0, flat.numel(), (), generator=generator))] = bad


def copy_of(update: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The same arguments in new memory; the learning rate stays where it is."""

    def moved(x: Any) -> Any:
        if isinstance(x, list):
            return [moved(each) for each in x]
        return x.to(device, copy=True) if isinstance(x, Tensor) else x

    return tuple(x if number == LAST_TENSOR else moved(x) for number, x in enumerate(update))


MOVED = ("values", "grad", "exp_avg", "exp_avg_sq", "scales", "num_skipped", "step")


def differences(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> list[str]:
    """What an update has left that is not the same bit for bit, NaN for NaN."""
    found = []
    for name, x, y in zip(MOVED, actual, expected, strict=False):
        if x is not None and not torch.equal(x.cpu().nan_to_num(12345.0), y.cpu().nan_to_num(12345.0)):
            different = (x.cpu().double() != y.cpu().double()).nonzero()
            first = tuple(different[0].tolist())
            found.append(f"{name}: {len(different)} of {x.numel()}, first {first}: {x[first]}, expected {y[first]}")
    return found
