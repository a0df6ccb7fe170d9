"""Provides ActiveSGD, which moves active weights by their gradient, with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from smet_compile.ops.rules import Block, Options, Rule, Slot, register_rule
from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.options import CommonOptions


def sgd(block: Block, options: Options) -> tuple[Tensor, Tensor]:
    """Makes one step of stochastic gradient descent with momentum, as ``torch.optim.SGD`` without dampening.

    g' = g + λ θ, b ← μ b + g', θ ← θ - rate b, or θ - rate (g' + μ b) with Nesterov's momentum. Returns the new weight
    and the new buffer.
    """
    (buffer,) = block.slots
    grad = block.grad + options.weight_decay * block.weight
    buffer = options.momentum * buffer + grad
    direction = grad + options.momentum * buffer if options.nesterov else buffer
    return block.weight - block.rate * direction, buffer


SGD = register_rule(
    Rule("sgd", sgd, slots=(Slot("momentum_buffer"),), options=("momentum", "weight_decay", "nesterov"))
)


class ActiveSGD(ActiveOptimizer):
    """Implements SGD with momentum for active weights only.

    For block i of a compact weight of density d, t_i its age in steps::

        b ← μ b + g + λ θ
        θ ← θ - α d^(-p) min(1, t_i / W) b

    Args:
        params: the model; or parameters or parameter groups, with ``model=`` given.
        lr: α, a number or a 0-d tensor.
        momentum: μ.
        weight_decay: λ.
        nesterov: whether the step looks one step ahead.
        common: see ``CommonOptions``; W is 100 and p is 0 unless given, since a gradient's size does not follow the
            density as that of Adam's step does.
    """

    rule = SGD
    lr_density_exponent = 0.0

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, options, common)
