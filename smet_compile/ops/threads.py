"""Warns where threads that wait by spinning take the cores that other processes need."""

from __future__ import annotations

import os

import torch

from smet_compile.ops.torch_insides import warn_once

_FULL = 1.5
"""Threads and load for each core from which on threads wait for one another's cores."""


def warn_of_spinning() -> None:
    """Warns once where OpenMP's threads spin while they wait, and other processes use the same cores.

    A thread that spins keeps its core from the thread that it waits for.
    """
    num_threads, num_cores = torch.get_num_threads(), os.cpu_count() or 1
    if num_threads == 1 or os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT"):
        return
    try:
        load = os.getloadavg()[0]
    except OSError:
        return
    if load + num_threads > _FULL * num_cores:
        warn_once(
            f"smet_compile: {num_threads} threads here share {num_cores} cores with others (load {load:.1f}). "
            "Threads that wait spin, which makes all of them several times slower: set OMP_WAIT_POLICY=PASSIVE "
            "before Python starts, or OMP_NUM_THREADS to the cores that are free"
        )
