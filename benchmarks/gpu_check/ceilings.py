"""Measures what the card can do at most: a copy, a large product, and reads from the L2 cache, on random data."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu_check.records import Check
from benchmarks.ratios import Clock

COPIED_BYTES, TINY_COPIED_BYTES = 2**30, 2**20
SIDE, TINY_SIDE = 8192, 64
L2_BYTES, L2_READS = 2**24, 256
REPEATS = 9


def run(check: Check) -> None:
    clock = Clock(check.device)
    for what, measure in (("copy", _copy), ("product", _product), ("L2", _l2)):
        with check.attempt(what):
            work, field, amount = measure(check)
            seconds = median_seconds(clock, work, check.size(REPEATS, 2))
            check.record(what, seconds=seconds, **{field: amount / seconds})


def median_seconds(clock: Clock, work: Callable[[], object], repeats: int) -> float:
    """Returns the median of some calls, after one that does not count."""
    return statistics.median([clock.seconds(work) for _ in range(repeats + 1)][1:])


def _copy(check: Check) -> tuple[Callable[[], object], str, float]:
    source = torch.randn(check.size(COPIED_BYTES, TINY_COPIED_BYTES) // 4, device=check.device)
    copy = torch.empty_like(source)
    return lambda: copy.copy_(source), "bytes_a_second", 2 * source.nbytes


def _product(check: Check) -> tuple[Callable[[], object], str, float]:
    side = check.size(SIDE, TINY_SIDE)
    a, b = (torch.randn(side, side, device=check.device).to(torch.bfloat16) for _ in range(2))
    return lambda: a @ b, "operations_a_second", 2 * side**3


def _l2(check: Check) -> tuple[Callable[[], object], str, float]:
    """Sums one tensor that the cache holds, again and again: what torch gets out of it, no bound of the hardware."""
    reads = check.size(L2_READS, 2)
    held = torch.randn(L2_BYTES // 4, device=check.device).expand(reads, -1)
    return lambda: held.sum(1), "bytes_a_second", reads * held[0].nbytes
