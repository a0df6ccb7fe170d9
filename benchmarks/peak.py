"""Measures peak memory since a moment: of a GPU by torch's allocator, of a CPU by the Linux kernel's count."""

from __future__ import annotations

import gc

import torch

from benchmarks.measuring import at_rest, resident, restart_peak
from benchmarks.ratios import is_gpu


class Peak:
    """Measures the peak over the memory that is in use when this object is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        self._before = torch.cuda.memory_allocated(device) if is_gpu(device) else at_rest()

    def restart(self) -> None:
        if is_gpu(self._device):
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            restart_peak()

    @property
    def bytes(self) -> int:
        """Returns the peak since ``restart``, over the memory in use at the beginning."""
        peak = torch.cuda.max_memory_allocated(self._device) if is_gpu(self._device) else resident("VmHWM")
        return peak - self._before
