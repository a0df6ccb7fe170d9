"""active_adamw_: the optimizer step of one parameter, as an op that mutates weight and moments in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import reference as ref
from smet_compile.ops.chunks import Chunk, Place, compact_chunks, plain_chunks, unlocated_chunks
from smet_compile.ops.codes import EXP_AVG_CODES, EXP_AVG_SQ_CODES
from smet_compile.ops.stored import Codes, Numbers

WEIGHT, EXP_AVG, EXP_AVG_SQ = range(3)
_WEIGHTS_AT_ONCE = 2**20
_WEIGHTS_IN_CACHE = 2**15
"""As many as a processor's cache holds with all that is made of them on the way."""


def update_all(updates: list[tuple[Any, ...]]) -> None:
    """``active_adamw_`` on one parameter after another."""
    for arguments in updates:
        active_adamw_(*arguments)


def active_adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor | None,
    num_skipped: Tensor,
    step: Tensor,
    lr: Tensor,
    generation: Tensor | None,
    births: Tensor | None,
    topology: Tensor | None,
    index: list[Tensor],
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
        exp_avg, exp_avg_sq: moments of the shape of ``values``, fp32, fp64 or bf16, or uint8 codes; updated.
        scales: (2, num_groups) fp32, what the codes of the two moments are relative to (``codes``); updated. None
            without codes.
        num_skipped: int64 scalar, raised by the number of blocks whose gradient is not finite; those keep
            weight and moments, the step counts for them all the same.
        step: int64 scalar, the number of updates before this one; raised by one. lr: scalar tensor.
        generation, births: block i was born after step ``births[generation[i]]``; its age is the new ``step`` less
            that.
        topology, index, shape, matrix, block_shape: where the blocks lie in the dense weight, which is what the
            rounding noise and the scales hang on; None and empty lists for a plain parameter.
        density_rate: d^(-p). warmup_steps: W; 0 for none.
        shared_step: bias corrections by ``step`` instead of the age (the naive rule).
        noise_seed: rounds bf16 weights and moments, and codes, stochastically; None: to nearest.
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
    stored = [values, exp_avg, exp_avg_sq]
    if generation is None and all(t.is_contiguous() for t in stored):
        stored, grad = [t.view(-1) for t in stored], grad.reshape(-1)
    noisy = noise_seed is not None and any(t.dtype in (torch.bfloat16, torch.uint8) for t in stored)
    keys = [ref.noise_key(noise_seed or 0, step, stream) for stream in (WEIGHT, EXP_AVG, EXP_AVG_SQ)] if noisy else []
    shared = _Shared(tables, ref.AdamWScalars(beta1, beta2, eps, weight_decay), keys, scales)
    layout = None if topology is None else Layout.of_lists(shape, matrix, block_shape)
    for rows, place in _chunks(grad, topology, index, layout, located=noisy or scales is not None):
        born = None if generation is None else generation[rows]
        num_skipped += _update([t[rows] for t in stored], grad[rows], born, shared, place)


def _chunks(
    grad: Tensor, topology: Tensor | None, index: list[Tensor], layout: Layout | None, located: bool
) -> Iterable[Chunk]:
    """The rows in parts; ``located``, where they lie too."""
    weights_at_once = min(_WEIGHTS_AT_ONCE, _WEIGHTS_IN_CACHE) if grad.device.type == "cpu" else _WEIGHTS_AT_ONCE
    at_once = max(1, weights_at_once // grad[0].numel())
    if not located:
        return unlocated_chunks(len(grad), at_once)
    if topology is None or layout is None:
        return plain_chunks(grad.shape, grad.device, at_once)
    return compact_chunks(topology, index, layout, len(grad), at_once)


class _Shared(NamedTuple):
    """What all chunks of a step share. ``keys``: of the noise, by stream; none where all is rounded to nearest."""

    tables: tuple[Tensor, Tensor, Tensor]
    scalars: ref.AdamWScalars
    keys: list[Tensor]
    scales: Tensor | None


def _update(
    stored: list[Tensor], grad: Tensor, generation: Tensor | None, shared: _Shared, place: Place | None
) -> Tensor:
    """Updates weight and moments of some rows in place; returns how many blocks were skipped."""
    dtype = ref.compute_dtype(stored[WEIGHT].dtype)
    kept = _kept(stored, shared.scales, place)
    old = [each.read(dtype) for each in kept]
    rate, bias1, bias2 = (ref.per_block(table, generation, old[WEIGHT]) for table in shared.tables)
    new = ref.adamw(old[0], grad.to(dtype), old[1], old[2], rate, bias1, bias2, shared.scalars)
    finite = ref.finite_blocks(grad, num_block_dims=0 if generation is None else grad.dim() - 1)
    positions = place.positions if place and shared.keys else None
    for stream, (each, before, after) in enumerate(zip(kept, old, new, strict=True)):
        noise = None
        if positions is not None and each.takes_noise:
            noise = ref.noise_bits(shared.keys[stream], positions)
        each.write(before, after, finite, noise)
    return finite.numel() - finite.sum()


def _kept(stored: list[Tensor], scales: Tensor | None, place: Place | None) -> list[Numbers | Codes]:
    if scales is None:
        return [Numbers(tensor) for tensor in stored]
    assert place is not None
    groups = place.groups
    moments = zip(stored[EXP_AVG:], scales, (EXP_AVG_CODES, EXP_AVG_SQ_CODES), strict=True)
    return [Numbers(stored[WEIGHT]), *(Codes(codes, row, groups, kind) for codes, row, kind in moments)]
