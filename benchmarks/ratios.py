"""Measures calls side by side in one run, in turns: A B C A B C ..., and the ratios within each turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], object]
_HEAD_START_CYCLES = 40_000_000
_BYTES_OF_A_FLUSH = 2**28


class Clock:
    """Measures the seconds that a call takes: by the wall on a CPU, between two events on a GPU.

    On a GPU the L2 cache is flushed before, and the host has a head start of some 20 milliseconds: what is measured is
    the device alone, with inputs in its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(_BYTES_OF_A_FLUSH, dtype=torch.uint8, device=device) if is_gpu(device) else None

    def seconds(self, work: Work) -> float:
        if self._flushed is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START_CYCLES)
        self._flushed.zero_()
        before.record()
        work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass(frozen=True)
class Pairs:
    """Holds seconds of a baseline and of a candidate; the i-th of both are from the same turn."""

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def speedups(self) -> list[float]:
        """Returns for each pair how many times faster than the baseline the candidate is."""
        return [slow / fast for slow, fast in zip(self.baseline, self.candidate, strict=True)]

    @property
    def costs(self) -> list[float]:
        """Returns for each pair how many times the baseline's time the candidate takes."""
        return [1 / speedup for speedup in self.speedups]

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.baseline), statistics.median(self.candidate)

    @classmethod
    def of_sum(cls, parts: Iterable[Pairs]) -> Pairs:
        """Adds the i-th pairs of several calls, as if each turn made them one after another."""
        parts = list(parts)
        baseline, candidate = (zip(*(getattr(p, side) for p in parts), strict=True) for side in cls.__annotations__)
        return cls(tuple(map(sum, baseline)), tuple(map(sum, candidate)))


def in_turns(baseline: Work, candidates: Sequence[Work], repeats: int, clock: Clock, warmup: int = 1) -> list[Pairs]:
    """Runs the baseline and each candidate once in each of ``repeats`` turns, after some turns that do not count."""
    works = (baseline, *candidates)
    turns = [[clock.seconds(work) for work in works] for _ in range(warmup + repeats)]
    first, *others = zip(*turns[warmup:], strict=True)
    return [Pairs(first, other) for other in others]
