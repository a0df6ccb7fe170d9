"""Provides ActiveLion, which moves active weights by the sign of a mean gradient and keeps one moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from smet_compile.ops.rules import Block, Options, Rule, Slot, register_rule
from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.options import CommonOptions


def lion(block: Block, options: Options) -> tuple[Tensor, Tensor]:
    """Makes one Lion step (Chen et al. 2023, arXiv 2302.06675): θ ← θ - rate (sign(β1 m + (1 - β1) g) + λ θ).

    The moment then becomes β2 m + (1 - β2) g. Returns the new weight and moment.
    """
    (exp_avg,) = block.slots
    direction = (options.beta1 * exp_avg + (1 - options.beta1) * block.grad).sign()
    weight = block.weight - block.rate * (direction + options.weight_decay * block.weight)
    return weight, options.beta2 * exp_avg + (1 - options.beta2) * block.grad


LION = register_rule(Rule("lion", lion, slots=(Slot("exp_avg"),), options=("beta1", "beta2", "weight_decay")))


class ActiveLion(ActiveOptimizer):
    """Implements Lion (Chen et al. 2023, arXiv 2302.06675) with a moment for active weights only.

    For block i of a compact weight of density d, t_i its age in steps::

        θ ← θ - α d^(-p) min(1, t_i / W) (sign(β1 m + (1 - β1) g) + λ θ)
        m ← β2 m + (1 - β2) g

    A rate of a third to a tenth of AdamW's is usual, with as much more weight decay.

    Args:
        params: the model; or parameters or parameter groups, with ``model=`` given.
        lr: α, a number or a 0-d tensor.
        betas: β1 and β2.
        weight_decay: λ.
        common: see ``CommonOptions``; W is 100 and p is 1 unless given.
    """

    rule = LION

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, common)
