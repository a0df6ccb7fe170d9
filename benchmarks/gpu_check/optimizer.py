"""Times optimizer steps against a copy, and one kernel for product and update against two."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from torch.profiler import profile, supported_activities

import smet_compile as smet
from benchmarks import chosen
from benchmarks.gpu_check.cases import DTYPE, Case, Layer
from benchmarks.gpu_check.records import Check
from benchmarks.layer import DENSITY
from benchmarks.ratios import Clock, Work, in_turns
from benchmarks.sections.optimizer import NUM_UPDATES, Kind, aged_optimizer
from smet_compile.ops.choose import TRITON
from smet_compile.ops.updates import Update

NUM_TENSORS, SIDE = 200, 1408
TINY_NUM_TENSORS, TINY_SIDE = 2, 32
COPIED_BYTES, TINY_COPIED_BYTES = 2**30, 2**20
REPEATS = 7
_BF16, _FP32 = torch.bfloat16, torch.float32
STATES: dict[str, tuple[torch.dtype, Any, int]] = {
    "tiles, fp32": (_FP32, None, 28),
    "single weights, fp32": (_FP32, None, 29),
    "tiles, bf16": (_BF16, _BF16, 14),
    "single weights, bf16": (_BF16, _BF16, 15),
    "tiles, bf16, 8-bit moments": (_BF16, "int8", 10),
    "single weights, bf16, 8-bit moments": (_BF16, "int8", 11),
}
"""Dtypes of weights and moments, and the bytes that a step moves for each weight. Tiles are of 64."""
TILES = {128: (2048, 16384), 64: (2048, 16384), 32: (2048, 16384)}


def run(check: Check) -> None:
    for kind in kinds(check):
        with check.attempt("step", case=kind.name):
            _measure_step(check, kind)
    tiles = check.size(TILES, {16: (16, 16)})
    for block, counts in tiles.items():
        for tokens in dict.fromkeys(counts):
            with check.attempt("fused", block=block, tokens=tokens):
                _measure_fused(check, block, tokens)


def kinds(check: Check) -> list[Kind]:
    """Returns kinds of weights and state, with the bytes that a step moves for each weight."""
    found = [
        Kind(name, 1 if name.startswith("single") else check.size(64, 16), dtype, moments, num_bytes, True)
        for name, (dtype, moments, num_bytes) in STATES.items()
    ]
    return found[2:4] if check.dry else found


def aged(check: Check, kind: Kind, side: int, num_matrices: int) -> smet.ActiveAdamW:
    """Makes an optimizer after some topology updates, with a gradient in every parameter."""
    return aged_optimizer(kind, side, check.settings(1), num_matrices, check.size(NUM_UPDATES, 1))


def _measure_step(check: Check, kind: Kind) -> None:
    optimizer = aged(check, kind, *check.size((SIDE, NUM_TENSORS), (TINY_SIDE, TINY_NUM_TENSORS)))
    active = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    source = torch.zeros(check.size(COPIED_BYTES, TINY_COPIED_BYTES), dtype=torch.uint8, device=check.device)
    copy = torch.empty_like(source)
    clock = Clock(check.device)
    (pairs,) = in_turns(lambda: copy.copy_(source), [optimizer.step], check.settings(REPEATS).repeats, clock)
    check.record(
        "step",
        case=kind.name,
        kernel=chosen.of_update(optimizer),
        weights=active,
        seconds=pairs.medians[1],
        copy_bytes_a_second=2 * source.nbytes / pairs.medians[0],
        over_copy=[round(active * kind.bytes_per_weight / (2 * source.nbytes) * each, 4) for each in pairs.speedups],
        host_seconds=_host_seconds(check, optimizer),
        launches=_num_launches(check, optimizer),
    )


def _host_seconds(check: Check, optimizer: smet.ActiveAdamW) -> float:
    check.synchronize()
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def _num_launches(check: Check, optimizer: smet.ActiveAdamW) -> int:
    """Returns how many kernels and copies one step starts; 0 without a GPU."""
    if check.dry:
        return 0
    with profile(activities=supported_activities()) as profiler:
        optimizer.step()
        check.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda and not event.is_user_annotation for event in profiler.events())


def _measure_fused(check: Check, block: int, tokens: int) -> None:
    """Times a weight gradient and its update: two kernels, and one."""
    two, one, can_be_one = fused_calls(check, block, tokens)
    (pairs,) = in_turns(two, [one], check.settings(REPEATS).repeats, Clock(check.device))
    seconds = {"two_seconds": pairs.medians[0], "one_seconds": pairs.medians[1]}
    ratios = [round(cost, 4) for cost in pairs.costs]
    check.record("fused", block=block, tokens=tokens, is_one=can_be_one, **seconds, ratios=ratios)


def fused_calls(check: Check, block: int, tokens: int) -> tuple[Work, Work, bool]:
    """Returns product and update in two kernels, the same in one, and whether that is one indeed."""
    adamw, sampled_tiles, sampled_update = (
        importlib.import_module(f"{TRITON}.{name}") for name in ("adamw", "sampled_tiles", "sampled_update")
    )
    layer, update = _layer_and_update(check, block, tokens)

    def two() -> None:
        update.grad = sampled_tiles.sampled_matmul(layer.grad, layer.input, layer.topology)
        adamw.update_all([update])
        update.grad = update.values

    def one() -> None:
        sampled_update.sampled_update(layer.grad, layer.input, None, update)

    return two, one, sampled_update.fuses(layer.grad, None, update)


def _layer_and_update(check: Check, block: int, tokens: int) -> tuple[Layer, Update]:
    """Returns a layer and the update of its weight, in bf16 with bf16 moments, with no gradient kept."""
    side = check.size(4096, 32)
    layer = Layer(Case(side, side, block, tokens), check.device)
    linear = torch.nn.Linear(side, side, bias=False, dtype=DTYPE, device=check.device)
    smet.sparsify(linear, DENSITY, block_shape=block)
    optimizer = smet.ActiveAdamW(linear, moment_dtype=DTYPE)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    update = optimizer.update_of(parameter, optimizer.param_groups[0])
    assert update.topology is not None
    layer.topology = update.topology
    update.grad = update.values
    return layer, update
