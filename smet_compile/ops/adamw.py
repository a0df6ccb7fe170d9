"""active_adamw_: the optimizer step of one parameter, as an op that mutates weight and moments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.format import Layout, unpack_bits
from smet_compile.format.blocks import dense_positions
from smet_compile.ops import reference as ref

WEIGHT, EXP_AVG, EXP_AVG_SQ = range(3)


def active_adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    num_skipped: Tensor,
    step: Tensor,
    lr: Tensor,
    generation: Tensor | None,
    births: Tensor | None,
    topology: Tensor | None,
    layout: Layout | None,
    density_rate: float,
    scalars: ref.AdamWScalars,
    warmup_steps: int,
    shared_step: bool,
    noise_seed: int | None,
) -> None:
    """SMET's rule (arXiv 2606.00888) on one compact parameter; plain AdamW on a parameter without generations.

    Args:
        values, grad: (N,) or (N, bm, bn), or any shape for a plain parameter. ``values`` is updated.
        exp_avg, exp_avg_sq: moments of the shape of ``values``, fp32, fp64 or bf16; updated.
        num_skipped: int64 scalar, raised by the number of blocks whose gradient is not finite; those keep
            weight and moments, the step counts for them all the same.
        step: int64 scalar, 1 at the first update. lr: scalar tensor.
        generation, births: block i was born at step ``births[generation[i]]``; its age is ``step`` less that.
        topology, layout: where the blocks lie in the dense weight, which is what the rounding noise hangs on.
        density_rate: d^(-p). warmup_steps: W; 0 for none.
        shared_step: bias corrections by ``step`` instead of the age (the naive rule).
        noise_seed: rounds bf16 weights and moments stochastically; None: to nearest.
    """
    dtype = ref.compute_dtype(values.dtype)
    age = (step if births is None else step - births).clamp(min=1).double()
    bias_age = step.double().expand_as(age) if shared_step else age
    rate, bias1, bias2 = (
        ref.per_block(table, generation, values.new_empty((1,) * values.dim(), dtype=dtype))
        for table in (
            ref.step_sizes(age, lr, density_rate, warmup_steps),
            1 - scalars.beta1**bias_age,
            1 - scalars.beta2**bias_age,
        )
    )
    old = [t.to(dtype) for t in (values, exp_avg, exp_avg_sq)]
    new = ref.adamw(old[0], grad.to(dtype), old[1], old[2], rate, bias1, bias2, scalars)
    finite = ref.finite_blocks(grad, num_block_dims=0 if generation is None else grad.dim() - 1)
    num_skipped += finite.numel() - finite.sum()
    positions = _positions(values, topology, layout) if noise_seed is not None else None
    for stream, (stored, before, after) in enumerate(zip((values, exp_avg, exp_avg_sq), old, new, strict=True)):
        kept = torch.where(finite, after, before)
        if positions is not None and stored.dtype == torch.bfloat16:
            assert noise_seed is not None
            bits = ref.noise_bits(ref.noise_key(noise_seed, step, stream), positions)
            kept = torch.where(finite, ref.round_stochastic(kept, bits), stored)
        stored.copy_(kept)


def _positions(values: Tensor, topology: Tensor | None, layout: Layout | None) -> Tensor:
    """Dense position of each stored element, shaped like ``values``."""
    if topology is None or layout is None:
        return torch.arange(values.numel(), device=values.device).view(values.shape)
    return dense_positions(unpack_bits(topology, layout.num_blocks), layout).view(values.shape)
