"""Counts ages at one byte a block: each block holds the number of a generation, a small table the generations' births.

Blocks are born only at topology updates, so few births are alive at a time. When a table is full, generations
without blocks are forgotten; then those so old that no bias correction or warm-up sees their age any more are
merged; and where even that frees nothing, the table grows, so that an age is never wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FREE = -1
_SIZES = tuple(2**bits for bits in range(8, 32))
_DTYPES = ((256, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))


def first_generation(num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the table of blocks born at step 0: generation (N,) uint8 and births (256,) int64."""
    births = torch.full((256,), _FREE, dtype=torch.int64, device=device)
    births[0] = 0
    return torch.zeros(num_blocks, dtype=torch.uint8, device=device), births


def check_generations(name: str, generation: Tensor, births: Tensor, num_blocks: int, step: int) -> None:
    """Raises ValueError for a table that no training makes, or a block whose generation is not in the table."""
    size = births.numel()
    if births.dtype != torch.int64 or births.dim() != 1 or size not in _SIZES:
        raise ValueError(f"{name}: expected births of int64, 256 or a larger power of two, got {births.dtype} {size}")
    if bool(((births < _FREE) | (births > step)).any()):
        raise ValueError(f"{name}: expected births of {_FREE} or from 0 to step {step}, got others")
    if generation.dtype != _dtype_for(size) or generation.shape != (num_blocks,):
        raise ValueError(
            f"{name}: expected a generation of {_dtype_for(size)} for each of {num_blocks} blocks, got "
            f"{generation.dtype} of shape {tuple(generation.shape)}"
        )
    if num_blocks > 0 and not 0 <= int(generation.min()) <= int(generation.max()) < size:
        raise ValueError(f"{name}: expected generations from 0 to {size - 1}, got others")
    is_used = torch.zeros_like(births, dtype=torch.bool).index_fill_(0, generation.long(), True)
    if bool((births[is_used] == _FREE).any()):
        raise ValueError(f"{name}: expected generations that have a birth, got one that is free")


def ages(generation: Tensor, births: Tensor, step: Tensor) -> Tensor:
    """Returns (N,) int64: steps since each block was born."""
    return step - births.index_select(0, generation.int())


def add_generation(
    generation: Tensor, births: Tensor, born: Tensor, step: Tensor, mature: int
) -> tuple[Tensor, Tensor]:
    """Gives the blocks of the mask ``born`` (N,) a generation of their own, born at ``step``.

    ``mature``: the age from which a rule makes no difference any more (``mature_age``).

    Returns generation and births, the same tensors changed in place unless the table had to grow.
    """
    if not (births == _FREE).any():
        _forget_empty(generation, births)
    if not (births == _FREE).any():
        _merge_mature(generation, births, int(step) - mature)
    if not (births == _FREE).any():
        generation, births = _grow(generation, births)
    slot = int((births == _FREE).nonzero()[0])
    births[slot] = step
    generation[born] = slot
    return generation, births


def _forget_empty(generation: Tensor, births: Tensor) -> None:
    population = torch.bincount(generation.int(), minlength=births.numel())
    births[population == 0] = _FREE


def _merge_mature(generation: Tensor, births: Tensor, latest_birth: int) -> None:
    """Makes all generations born at or before ``latest_birth`` one, of the youngest's age."""
    slots = ((births != _FREE) & (births <= latest_birth)).nonzero().squeeze(1)
    if slots.numel() < 2:
        return
    youngest = slots[births[slots].argmax()]
    renumbered = torch.arange(births.numel(), device=births.device)
    renumbered[slots] = youngest
    generation.copy_(renumbered.index_select(0, generation.int()))
    births[slots[slots != youngest]] = _FREE


def _grow(generation: Tensor, births: Tensor) -> tuple[Tensor, Tensor]:
    size = births.numel() * 2
    grown = torch.full((size,), _FREE, dtype=torch.int64, device=births.device)
    grown[: births.numel()] = births
    return generation.to(_dtype_for(size)), grown


def _dtype_for(size: int) -> torch.dtype:
    """Returns the smallest dtype for the number of a generation in a table of ``size``."""
    return next(dtype for limit, dtype in _DTYPES if size <= limit)
