"""Defines the kernel of "triton_adamw" that counts the steps and computes the rates, before weights are moved."""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_step as at
from smet_compile.ops.kernels.triton.adamw_step import fp32, fp64, pointer, rates_of


@triton.jit
def _rates_of(age, bias_age, born, row, lr):
    """Returns step size, bias correction and decay at an age, in fp32. Blocks born at step 0 are the initial ones."""
    warmup_steps = tl.where(born == 0, tl.load(row + at.INITIAL_WARMUP_STEPS), tl.load(row + at.WARMUP_STEPS))
    warm = tl.where(warmup_steps > 0, tl.minimum(age / tl.maximum(warmup_steps, 1).to(tl.float64), 1.0), 1.0)
    unbias1 = 1.0 / (1.0 - tl.exp(bias_age * fp64(row, at.LOG_BETA1)))
    unbias2 = 1.0 / (1.0 - tl.exp(bias_age * fp64(row, at.LOG_BETA2)))
    rate = (lr * fp64(row, at.DENSITY_RATE) * warm).to(tl.float32)
    return rate * unbias1.to(tl.float32), unbias2.to(tl.float32), rate * fp32(row, at.WEIGHT_DECAY)


@triton.jit
def prepare(table, step_table, rates, GENERATIONS: tl.constexpr):
    """Raises each parameter's step, and fills its ``rates``: one program for each parameter."""
    row = table + tl.program_id(0) * at.NUM_COLUMNS
    step_row = step_table + tl.program_id(0) * at.NUM_STEP_COLUMNS
    step_pointer = pointer(row, at.STEP, tl.int64)
    step = tl.load(step_pointer) + 1
    lr = fp64(step_row, at.LR)
    if tl.load(step_row + at.LR_IS_ADDRESS) != 0:
        lr = tl.load(pointer(step_row, at.LR, tl.float64))
    rates = rates_of(row, rates)
    num_generations = tl.load(row + at.NUM_GENERATIONS)
    has_births = tl.load(row + at.BIRTHS) != 0
    births = pointer(row, at.BIRTHS, tl.int64)
    shared_step = tl.load(row + at.SHARED_STEP) != 0
    for first in range(0, num_generations, GENERATIONS):
        number = first + tl.arange(0, GENERATIONS)
        here = number < num_generations
        born = tl.load(births + number, mask=here & has_births, other=0)
        age = tl.maximum(step - born, 1).to(tl.float64)
        size, unbias2, decay = _rates_of(age, tl.where(shared_step, step.to(tl.float64), age), born, row, lr)
        tl.store(rates + at.RATES * number, size, mask=here)
        tl.store(rates + at.RATES * number + 1, unbias2, mask=here)
        tl.store(rates + at.RATES * number + 2, decay, mask=here)
    tl.store(step_pointer, step)
