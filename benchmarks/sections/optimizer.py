"""Measures an optimizer step on 16M active weights against fused dense AdamW on as many, and on all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import smet_compile as smet
from benchmarks import chosen
from benchmarks.layer import DENSITY
from benchmarks.ratios import Clock, Pairs, in_turns
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, at_most

MATRICES, SIDE, QUICK_SIDE = 4, 4096, 128
NUM_UPDATES = 3
SLOWER = 1.1
NOTE = (
    f'{MATRICES} matrices, density {DENSITY}, {NUM_UPDATES + 1} generations of blocks. "as many": the dense tensor has '
    'as many elements as there are active weights; "all": as many as the whole dense weights. In bf16 both hold '
    "bf16 moments and ours rounds stochastically, which torch does not. Bandwidth counts every weight, gradient and "
    "moment once read, and all but the gradient once written. In fp32 both wait for memory: ours reads one byte of "
    "age more (29 bytes for 28), and the rest moves with where pages lie, from run to run by a tenth. Pieces of 128 "
    "to 1,024 entries, prefetching, ages looked up in registers and one team of threads for all parameters were "
    "tried, and kept where they helped. bf16 and 8-bit moments are bound by arithmetic: one or two 32-bit hashes of "
    "each entry, conversions, and where single weights lie."
)


class Kind(NamedTuple):
    """Describes which weights an optimizer updates, and which state it keeps."""

    name: str
    block: int
    dtype: torch.dtype
    moment_dtype: Any
    bytes_per_weight: float
    has_target: bool


KINDS = (
    Kind("single weights, fp32", 1, torch.float32, None, 28, True),
    Kind("64 tiles, fp32", 64, torch.float32, None, 28, True),
    Kind("single weights, bf16", 1, torch.bfloat16, torch.bfloat16, 14, False),
    Kind("64 tiles, bf16", 64, torch.bfloat16, torch.bfloat16, 14, False),
    Kind("single weights, fp32, 8-bit moments", 1, torch.float32, "int8", 16, False),
    Kind("64 tiles, fp32, 8-bit moments", 64, torch.float32, "int8", 16, False),
)


def tables(settings: Settings) -> list[Table]:
    clock = Clock(settings.device)
    rows = [row for kind in KINDS for row in _rows(kind, settings, clock)]
    return [Table("Optimizer step", "sparse / dense", NOTE, rows)]


def _rows(kind: Kind, settings: Settings, clock: Clock) -> list[Row]:
    side = settings.size(SIDE, QUICK_SIDE)
    optimizer = aged_optimizer(kind, side, settings)
    active = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    rows = []
    for name, size, limit in (("as many", active, SLOWER), ("all", MATRICES * side**2, SLOWER * DENSITY)):
        dense = torch.zeros(size, dtype=kind.dtype, device=settings.device)
        (pairs,) = in_turns(dense_step(dense), [optimizer.step], settings.repeats, clock)
        target = at_most(limit) if kind.has_target else None
        more = _absolute(pairs, active * kind.bytes_per_weight)
        rows.append(Row(f"{kind.name} / {name}", chosen.of_update(optimizer), pairs.costs, target, more))
    return rows


def _absolute(pairs: Pairs, num_bytes: float) -> dict[str, str]:
    dense, sparse = pairs.medians
    return {
        "dense, ms": f"{1e3 * dense:.1f}",
        "sparse, ms": f"{1e3 * sparse:.1f}",
        "sparse, GB/s": f"{num_bytes / sparse / 1e9:.1f}",
    }


def dense_step(weight: Tensor) -> Callable[[], object]:
    """Returns a step of torch's fused AdamW on ``weight``."""
    parameter = nn.Parameter(weight)
    parameter.grad = torch.randn_like(weight)
    return torch.optim.AdamW([parameter], fused=True).step


def aged_optimizer(
    kind: Kind, side: int, settings: Settings, num_matrices: int = MATRICES, num_updates: int = NUM_UPDATES
) -> smet.ActiveAdamW:
    """Makes ``ActiveAdamW`` after some topology updates, with a gradient in every parameter."""
    with settings.device:
        matrices = [nn.Linear(side, side, bias=False, dtype=kind.dtype) for _ in range(num_matrices)]
    model = smet.sparsify(nn.Sequential(*matrices), DENSITY, block_shape=kind.block)
    optimizer = smet.ActiveAdamW(model, moment_dtype=kind.moment_dtype)
    manager = smet.TopologyManager(model, optimizer, total_steps=1000, every=1, schedule="cosine", auto_step=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(num_updates):
        optimizer.step()
        assert manager.step() is not None
    return optimizer
