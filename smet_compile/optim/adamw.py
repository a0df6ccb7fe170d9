"""Provides ActiveAdamW, SMET's optimizer, and NaiveAdamW, which does what mask libraries do, as a baseline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from smet_compile.ops.rules import Block, Options, Rule, Slot, register_rule
from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.options import CommonOptions


def adamw(block: Block, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Makes one AdamW step (Loshchilov and Hutter 2019), with step size and bias corrections by entry.

    θ ← θ - (step m / (√v̂ + ε) + decay θ), v̂ = v · unbias2, step = rate · unbias1, decay = rate · λ. Where ε = 0 and a
    gradient was always 0, the step is 0, not 0 / 0, so that entries over an edge stay zero. Returns the new weight and
    moments.
    """
    weight, grad, (exp_avg, exp_avg_sq), (unbias1, unbias2) = block.weight, block.grad, block.slots, block.of_age
    eps = max(options.eps, torch.finfo(weight.dtype).tiny)
    exp_avg = exp_avg + (1 - options.beta1) * (grad - exp_avg)
    exp_avg_sq = options.beta2 * exp_avg_sq + (1 - options.beta2) * grad * grad
    step, decay = block.rate * unbias1, block.rate * options.weight_decay
    move = step * exp_avg / ((exp_avg_sq * unbias2).sqrt() + eps) + decay * weight
    return weight - move, exp_avg, exp_avg_sq


def _bias_corrections(age: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns the factors 1 / (1 - β^t), so that no entry is divided."""
    return 1 / (1 - options.beta1**age), 1 / (1 - options.beta2**age)


def _mature_age(options: Options, dtype: torch.dtype) -> int:
    """Returns the age from which 1 / (1 - β^t) rounds to 1 in ``dtype`` for both β."""
    half_ulp = math.log(torch.finfo(dtype).eps / 4)
    return max(math.ceil(half_ulp / math.log(beta)) if beta > 0 else 1 for beta in (options.beta1, options.beta2))


ADAMW = register_rule(
    Rule(
        "adamw",
        adamw,
        slots=(Slot("exp_avg"), Slot("exp_avg_sq", signed=False)),
        options=("beta1", "beta2", "eps", "weight_decay"),
        of_age=_bias_corrections,
        mature_age=_mature_age,
    )
)
NAIVE_ADAMW = register_rule(dataclasses.replace(ADAMW, name="naive_adamw", shared_step=True))


class ActiveAdamW(ActiveOptimizer):
    """Implements AdamW with moments for active weights only, and local age and warm-up (SMET, arXiv 2606.00888).

    For block i of a compact weight of density d, t_i its age in steps (1 at the first update after growth)::

        m ← β1 m + (1 - β1) g          m̂ = m / (1 - β1^t_i)
        v ← β2 v + (1 - β2) g²         v̂ = v / (1 - β2^t_i)
        θ ← θ - α d^(-p) min(1, t_i / W) (m̂ / (√v̂ + ε) + λ θ)

    Args:
        params: the model; or parameters or parameter groups, with ``model=`` given.
        lr: α, a number or a 0-d tensor.
        betas: β1 and β2.
        eps: ε.
        weight_decay: λ.
        common: ``warmup_steps`` (W, 100), ``initial_warmup_steps`` (that of the blocks to start from, as W),
            ``lr_density_exponent`` (p, 1), ``moment_dtype``, ``stochastic_rounding``, ``model`` and ``seed``; see
            ``CommonOptions``.

    All of lr, betas, eps, weight_decay, both warm-ups and lr_density_exponent may differ by group. ``ActiveOptimizer``
    describes what happens to plain parameters and to gradients that are not finite, and the errors.
    """

    rule = ADAMW

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, common)


class NaiveAdamW(ActiveAdamW):
    """Corrects bias by the parameter's step count instead of the block's age, as a baseline.

    After a late topology update its first step on a grown block is (1 - β1) / √(1 - β2) = 3.16 times too large. It
    takes the arguments of ``ActiveAdamW``; ``warmup_steps`` is 0 unless given.
    """

    rule = NAIVE_ADAMW
    warmup_steps = 0
