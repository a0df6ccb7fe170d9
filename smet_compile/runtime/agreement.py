"""Data-parallel ranks must hold one topology: what they agree on before they change it.

Every rank makes the same calls in the same order; without ``torch.distributed`` they return what they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

distributed = torch.distributed


def _alone() -> bool:
    together = distributed.is_available() and distributed.is_initialized()
    return not together or distributed.get_world_size() == 1


def agree_on(positions: Tensor) -> Tensor:
    """The positions of rank 0, on every rank; their number is the same everywhere."""
    if not _alone():
        distributed.broadcast(positions, src=0)
    return positions


def agree_on_ready(ready: list[bool], device: torch.device) -> list[bool]:
    """For each weight, whether every rank is ready to change it. ``device``: the weights'."""
    if _alone():
        return ready
    on_cpu = distributed.get_backend() != "nccl"
    flags = torch.tensor(ready, dtype=torch.int32, device="cpu" if on_cpu else device)
    distributed.all_reduce(flags, distributed.ReduceOp.MIN)
    return [bool(flag) for flag in flags.tolist()]
