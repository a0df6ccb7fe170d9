"""active_adamw_: the optimizer step of one parameter, as an op that mutates weight and moments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.format import Layout, positions_of, unpack_bits
from smet_compile.format.blocks import dense_positions
from smet_compile.ops import reference as ref

WEIGHT, EXP_AVG, EXP_AVG_SQ = range(3)
_WEIGHTS_AT_ONCE = 2**20
_WEIGHTS_IN_CACHE = 2**15
"""As many as a processor's cache holds with all that is made of them on the way."""


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
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    density_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
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
        step: int64 scalar, the number of updates before this one; raised by one. lr: scalar tensor.
        generation, births: block i was born after step ``births[generation[i]]``; its age is the new ``step`` less
            that.
        topology, shape, matrix, block_shape: where the blocks lie in the dense weight, which is what the rounding
            noise hangs on; None and empty lists for a plain parameter.
        density_rate: d^(-p). warmup_steps: W; 0 for none.
        shared_step: bias corrections by ``step`` instead of the age (the naive rule).
        noise_seed: rounds bf16 weights and moments stochastically; None: to nearest.
    """
    step += 1
    if values.numel() == 0:
        return
    age = (step if births is None else step - births).clamp(min=1).double()
    bias_age = step.double().expand_as(age) if shared_step else age
    tables = (
        ref.step_sizes(age, lr, density_rate, warmup_steps),
        1 - beta1**bias_age,
        1 - beta2**bias_age,
    )
    scalars = ref.AdamWScalars(beta1, beta2, eps, weight_decay)
    stored = [values, exp_avg, exp_avg_sq]
    if generation is None and all(t.is_contiguous() for t in stored):
        stored, grad = [t.view(-1) for t in stored], grad.reshape(-1)
    rounds = noise_seed is not None and any(t.dtype == torch.bfloat16 for t in stored)
    keys = [ref.noise_key(noise_seed or 0, step, stream) for stream in (WEIGHT, EXP_AVG, EXP_AVG_SQ)] if rounds else []
    blocks = None
    if rounds and topology is not None:
        layout = Layout.of_lists(shape, matrix, block_shape)
        blocks = positions_of(unpack_bits(topology, layout.num_blocks))
    row_size = grad[0].numel()
    weights_at_once = min(_WEIGHTS_AT_ONCE, _WEIGHTS_IN_CACHE) if grad.device.type == "cpu" else _WEIGHTS_AT_ONCE
    rows_at_once = max(1, weights_at_once // row_size)
    for first in range(0, len(grad), rows_at_once):
        rows = slice(first, min(first + rows_at_once, len(grad)))
        part = [t[rows] for t in stored]
        positions = None
        if blocks is not None:
            positions = dense_positions(blocks[rows], layout).view(part[WEIGHT].shape)
        elif rounds:
            every = torch.arange(rows.start * row_size, rows.stop * row_size, device=grad.device)
            positions = every.view(part[WEIGHT].shape)
        born = None if generation is None else generation[rows]
        num_skipped += _update(part, grad[rows], born, tables, scalars, keys, positions)


def _update(
    stored: list[Tensor],
    grad: Tensor,
    generation: Tensor | None,
    tables: tuple[Tensor, Tensor, Tensor],
    scalars: ref.AdamWScalars,
    keys: list[Tensor],
    positions: Tensor | None,
) -> Tensor:
    """Updates weight and moments of some rows in place; returns how many blocks were skipped."""
    dtype = ref.compute_dtype(stored[WEIGHT].dtype)
    old = [t.to(dtype) for t in stored]
    rate, bias1, bias2 = (ref.per_block(table, generation, old[WEIGHT]) for table in tables)
    new = ref.adamw(old[0], grad.to(dtype), old[1], old[2], rate, bias1, bias2, scalars)
    finite = ref.finite_blocks(grad, num_block_dims=0 if generation is None else grad.dim() - 1)
    for stream, (storage, before, after) in enumerate(zip(stored, old, new, strict=True)):
        if positions is not None and storage.dtype == torch.bfloat16:
            after = ref.round_stochastic(after, ref.noise_bits(keys[stream], positions))
            before = storage
        storage.copy_(torch.where(finite, after, before))
    return finite.numel() - finite.sum()
