"""Before the update, one small program for each parameter: its step, and step sizes by age."""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_columns as at
from smet_compile.ops.kernels.triton.adamw_columns import fp64, pointer


@triton.jit
def rates_of(age, bias_age, row, lr):
    """Step size and bias corrections at an age, in fp32: SMET's rule but for the moments."""
    warmup_steps = tl.load(row + at.WARMUP_STEPS)
    warm = tl.where(warmup_steps > 0, tl.minimum(age / tl.maximum(warmup_steps, 1).to(tl.float64), 1.0), 1.0)
    bias1 = 1.0 - tl.exp(bias_age * fp64(row, at.LOG_BETA1))
    bias2 = 1.0 - tl.exp(bias_age * fp64(row, at.LOG_BETA2))
    rate = lr * fp64(row, at.DENSITY_RATE) * warm
    return rate.to(tl.float32), bias1.to(tl.float32), bias2.to(tl.float32)


@triton.jit
def prepare(table, rates, lrs, GENERATIONS: tl.constexpr):
    """Raises each parameter's step, and fills its ``rates``. ``lrs``: the learning rates that are on the host."""
    row = table + tl.program_id(0) * at.NUM_COLUMNS
    step_pointer = pointer(row, at.STEP, tl.int64)
    step = tl.load(step_pointer) + 1
    lr = tl.load(lrs + tl.program_id(0))
    if tl.load(row + at.LR) != 0:
        lr = tl.load(pointer(row, at.LR, tl.float64))
    rates += tl.load(row + at.FIRST_RATE)
    num_generations = tl.load(row + at.NUM_GENERATIONS)
    has_births = tl.load(row + at.BIRTHS) != 0
    births = pointer(row, at.BIRTHS, tl.int64)
    shared_step = tl.load(row + at.SHARED_STEP) != 0
    for first in range(0, num_generations, GENERATIONS):
        number = first + tl.arange(0, GENERATIONS)
        here = number < num_generations
        born = tl.load(births + number, mask=here & has_births, other=0)
        age = tl.maximum(step - born, 1).to(tl.float64)
        rate, bias1, bias2 = rates_of(age, tl.where(shared_step, step.to(tl.float64), age), row, lr)
        tl.store(rates + number, rate, mask=here)
        tl.store(rates + num_generations + number, bias1, mask=here)
        tl.store(rates + 2 * num_generations + number, bias2, mask=here)
    tl.store(step_pointer, step)
