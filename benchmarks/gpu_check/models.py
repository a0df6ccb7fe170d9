"""Trains LLaMA-350m's shapes with 8 layers, dense and sparse, and LLaMA-7b's shapes: times, memory, loss.

The stages compile their models side by side, since compiling takes longest, and then measure one after another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import smet_compile as smet
from benchmarks import chosen
from benchmarks.gpu_check.records import Check
from benchmarks.layer import DENSITY
from benchmarks.ratios import Clock
from benchmarks.training import BYTES, DENSE, FUSED, Recipe, Shape, Training, static_shapes
from smet_compile.ops import find_sites

SMALLER = Shape(hidden=1024, intermediate=2736, heads=16, layers=8, vocabulary=32000, sequence=256, batch=64)
LARGEST = Shape(hidden=4096, intermediate=11008, heads=32, layers=32, vocabulary=32000, sequence=256, batch=1)
TINY = Shape(hidden=64, intermediate=64, heads=2, layers=1, vocabulary=BYTES, sequence=8, batch=1)
DTYPE = torch.bfloat16
REPEATS, STEPS = 9, 20
BLOCK_OF_LARGEST = 64
INIT_STD = 0.02
COMPILE_THREADS = 2
"""Threads of each stage: all stages compile at the same time, on 16 cores."""


def dense(check: Check) -> None:
    _train_smaller(check, DENSE, 0)


def tiles_128(check: Check) -> None:
    _train_smaller(check, FUSED, 128)


def tiles_64(check: Check) -> None:
    _train_smaller(check, FUSED, 64)


def single_weights(check: Check) -> None:
    _train_smaller(check, FUSED, 1)


def largest_coded(check: Check) -> None:
    _train_largest(check, lambda model: smet.ActiveAdamW(model, 1e-4, moment_dtype="int8"))


def largest_scale(check: Check) -> None:
    _train_largest(check, lambda model: smet.ActiveScale(model, 1e-3))


@contextmanager
def _compiling(check: Check) -> Iterator[None]:
    """Sets how models are compiled; at tiny size they run as they are."""
    import torch._inductor.config as inductor

    if check.dry:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    with static_shapes(), inductor.patch(compile_threads=COMPILE_THREADS):
        yield


def _train_smaller(check: Check, method: str, block: int) -> None:
    """Times steps on the device, then how long each keeps Python; peak memory and losses beside them."""
    shape = check.size(SMALLER, replace(TINY, batch=2))
    with _compiling(check):
        start = time.perf_counter()
        run = Training(Recipe(method, shape, check.size(block, min(block, 16)), DTYPE, check.device))
        first = float(run.step())
        check.record("first step", seconds=time.perf_counter() - start, loss=first, peak_bytes=_peak_bytes(check))
        with check.alone() as waited:
            _restart_peak(check)
            clock = Clock(check.device)
            seconds = [clock.seconds(run.step) for _ in range(check.size(REPEATS, 1) + 1)][1:]
            host = [_host_seconds(check, run.step) for _ in range(check.size(REPEATS, 1))]
            check.record(
                "steps",
                seconds=statistics.median(seconds),
                all_seconds=[round(each, 5) for each in seconds],
                host_seconds=statistics.median(host),
                peak_bytes=_peak_bytes(check),
                formula_bytes=run.formula_bytes(),
                tokens=shape.tokens,
                operations=shape.flops(1 if method == DENSE else DENSITY),
                loss=float(run.step()),
                kernels=run.kernels,
                waited_seconds=waited,
            )


def _host_seconds(check: Check, step: Callable[[], Any]) -> float:
    check.synchronize()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _peak_bytes(check: Check) -> int:
    return 0 if check.dry else torch.cuda.max_memory_allocated(check.device)


def _restart_peak(check: Check) -> None:
    if not check.dry:
        check.synchronize()
        torch.cuda.reset_peak_memory_stats(check.device)


def _train_largest(check: Check, optimizer_of: Callable[[nn.Module], Any]) -> None:
    """Trains on one batch; a line for each step, so that what was reached is known where time runs out."""
    shape = check.size(LARGEST, TINY)
    model = sparse_model(shape, check.device, check.size(BLOCK_OF_LARGEST, 16))
    optimizer = optimizer_of(model)
    kernels = f"{chosen.of_products(find_sites(model).values())}, {chosen.of_update(optimizer)}"
    parameters = sum(p.numel() for p in model.parameters())
    check.record("model", kernels=kernels, parameters=parameters, allocated_bytes=_peak_bytes(check))
    with _compiling(check):
        step, batch = smet.compile_train_step(model, optimizer), shape.batch_on(check.device)
        for number in range(check.size(STEPS, 2)):
            start = time.perf_counter()
            loss = float(step(batch))
            seconds = time.perf_counter() - start
            check.record("step", number=number, seconds=seconds, loss=loss, peak_bytes=_peak_bytes(check))
            if number == 1:
                _restart_peak(check)


def sparse_model(shape: Shape, device: torch.device, block: int) -> nn.Module:
    """Makes a model sparse layer by layer on the device, which never holds more than one dense layer."""
    with torch.device("meta"):
        model: Any = shape.model(DTYPE)
    torch.manual_seed(0)
    for layer in model.model.layers:
        _initialise(layer, device)
        smet.sparsify(layer, DENSITY, block_shape=block)
    inner = model.model
    for outside in (inner.embed_tokens, inner.norm, model.lm_head):
        _initialise(outside, device)
    with device:
        inner.rotary_emb = type(inner.rotary_emb)(model.config)
    whole: nn.Module = model
    return whole


def _initialise(module: nn.Module, device: torch.device) -> None:
    """Allocates parameters on the device and fills them: matrices at random, gains with one."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=INIT_STD) if parameter.dim() > 1 else nn.init.ones_(parameter)
