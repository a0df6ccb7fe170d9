"""Provides ActiveScale, which moves active weights by a normalized gradient and keeps no state for compact weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from smet_compile.ops.rules import Block, Options, Rule, Slot, register_rule
from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.adamw import ADAMW
from smet_compile.optim.options import CommonOptions


def _mean(block: Block, options: Options) -> Tensor:
    """Returns the gradient, or its running mean where there is a slot for it, which is what is normalized."""
    if not block.slots:
        return block.grad
    return options.momentum * block.slots[0] + (1 - options.momentum) * block.grad


def scale(block: Block, options: Options) -> tuple[Tensor, ...]:
    """Makes one SCALE step (Glentis et al. 2025, arXiv 2506.16659): θ ← θ - rate (m / ‖m_unit‖ + λ θ).

    ‖m_unit‖ is the norm over the active weights of an output unit. Returns the new weight and, if it is kept, m.
    """
    assert block.unit_norm is not None
    mean = _mean(block, options)
    direction = mean / block.unit_norm.clamp(min=torch.finfo(mean.dtype).tiny)
    weight = block.weight - block.rate * (direction + options.weight_decay * block.weight)
    return (weight, mean) if block.slots else (weight,)


SCALE = register_rule(Rule("scale", scale, options=("momentum", "weight_decay"), normalized=_mean))
SCALE_MOMENTUM = register_rule(dataclasses.replace(SCALE, name="scale_momentum", slots=(Slot("exp_avg"),)))


class ActiveScale(ActiveOptimizer):
    """Implements SCALE (Glentis et al. 2025, arXiv 2506.16659), with state for the output head and vectors only.

    A matrix with gradient g moves by α d^(-p) g / ‖g_unit‖, the norm being that of each output unit over its active
    weights. The output head keeps a running mean m of its gradient and moves by m / ‖m_unit‖. Vectors (biases, norms)
    move by AdamW. A compact weight that is not the head has no state and, without warm-up, no ages: zero bytes.

    Args:
        params: the model; or parameters or parameter groups, with ``model=`` given.
        lr: α, a number or a 0-d tensor.
        momentum: the momentum of the head.
        weight_decay: λ.
        betas: β1 and β2 of AdamW.
        common: see ``CommonOptions``. W is 0 unless given, and p 1/2: d C numbers of one norm move an output by the
            root of their count.
    """

    rule = SCALE
    warmup_steps = 0
    lr_density_exponent = 0.5

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        **common: Unpack[CommonOptions],
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": 1e-8}
        super().__init__(params, options, common)

    @classmethod
    def rule_for(cls, is_vector: bool, is_head: bool) -> Rule:
        if is_vector:
            return ADAMW
        return SCALE_MOMENTUM if is_head else SCALE
