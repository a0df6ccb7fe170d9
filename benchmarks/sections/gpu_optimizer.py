"""Measures an optimizer step on 1e8 active weights in 200 tensors against the bandwidth of a copy on the device."""

from __future__ import annotations

import time

import torch
from torch.profiler import profile, supported_activities

import smet_compile as smet
from benchmarks import chosen
from benchmarks.ratios import Clock, in_turns
from benchmarks.sections.optimizer import Kind, aged_optimizer
from benchmarks.settings import Settings
from benchmarks.tables import AWAITS_GPU, Row, Table, at_least

NUM_TENSORS, SIDE = 200, 1408
QUICK_NUM_TENSORS, QUICK_SIDE = 4, 128
COPIED_BYTES, QUICK_COPIED_BYTES = 2**30, 2**20
TARGET = at_least(0.9)
KINDS = (
    Kind("64 tiles, fp32", 64, torch.float32, None, 28, True),
    Kind("single weights, fp32", 1, torch.float32, None, 29, True),
    Kind("64 tiles, bf16", 64, torch.bfloat16, torch.bfloat16, 14, True),
    Kind("single weights, bf16", 1, torch.bfloat16, torch.bfloat16, 15, True),
    Kind("64 tiles, bf16, 8-bit moments", 64, torch.bfloat16, "int8", 10, False),
)
NOTE = (
    f"{NUM_TENSORS} weights of {SIDE}x{SIDE}, density 0.25, several generations of blocks. Device time between events. "
    "Bytes of a step: each weight, gradient, moment (and age, of single weights) once read, all but gradient and age "
    f'once written; of a copy of {COPIED_BYTES >> 20} MiB: read and written. "launches" counts kernels and '
    'copies, by the profiler; "host" is how long the call keeps Python.'
)


def tables(settings: Settings) -> list[Table]:
    place = settings.on_gpu()
    return [Table("Optimizer step on a GPU", "bandwidth / that of a copy", NOTE, [_row(kind, place) for kind in KINDS])]


def _row(kind: Kind, place: Settings | None) -> Row:
    target = TARGET if kind.has_target else None
    if place is None:
        return Row(kind.name, target=target, unmeasured=AWAITS_GPU)
    optimizer = aged_optimizer(kind, place.size(SIDE, QUICK_SIDE), place, place.size(NUM_TENSORS, QUICK_NUM_TENSORS))
    active = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    source = torch.zeros(place.size(COPIED_BYTES, QUICK_COPIED_BYTES), dtype=torch.uint8, device=place.device)
    copy = torch.empty_like(source)
    (pairs,) = in_turns(lambda: copy.copy_(source), [optimizer.step], place.repeats, Clock(place.device))
    moved = active * kind.bytes_per_weight / (2 * source.nbytes)
    more = {
        "copy, GB/s": f"{2 * source.nbytes / pairs.medians[0] / 1e9:.0f}",
        "step, ms": f"{1e3 * pairs.medians[1]:.3g}",
        "host, ms": f"{1e3 * _host_seconds(optimizer):.3g}",
        "launches": str(_num_launches(optimizer)),
    }
    return Row(kind.name, chosen.of_update(optimizer), [moved * speedup for speedup in pairs.speedups], target, more)


def _host_seconds(optimizer: smet.ActiveAdamW) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def _num_launches(optimizer: smet.ActiveAdamW) -> int:
    """Kernels and copies that one step starts; 0 where there is no GPU."""
    with profile(activities=supported_activities()) as profiler:
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda and not event.is_user_annotation for event in profiler.events())
