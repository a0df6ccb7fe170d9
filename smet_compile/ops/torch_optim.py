"""Registers torch_optim_: one update of one parameter by torch.optim's AdamW, Adam or SGD, in functional form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from smet_compile.ops.library import library

ADAM_OPTIONS = ("beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize", "fused")
SGD_OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "fused")
"""The numbers that ``options`` holds, in this order; flags as 0 and 1."""
_STATE = (
    "Tensor{}? first, Tensor{}? second, Tensor{}? largest, Tensor{}? step, Tensor{} num_updates, Tensor{} num_skipped, "
    "Tensor lr, str rule, float[] options"
)
SINK_SCHEMA = "Tensor values, " + _STATE.replace("{}", "")


class _Update(NamedTuple):
    """Holds the arguments of ``torch_optim_``.

    Args:
        values, grad: of any one shape; ``values`` is updated.
        first, second, largest, step: exp_avg, exp_avg_sq, max_exp_avg_sq and step count, or the momentum buffer;
            None where the optimizer keeps none.
        num_updates: int64 scalar, raised by one; 0 where the state is new. num_skipped: raised by one where the
            gradient is not finite, which holds back the topology manager; the optimizer goes on, as it does in eager.
        lr: of shape (1,); float64 stands for a Python number. rule: "adam" or "sgd". options: ``ADAM_OPTIONS`` or
            ``SGD_OPTIONS``.
    """

    values: Tensor
    grad: Tensor
    first: Tensor | None
    second: Tensor | None
    largest: Tensor | None
    step: Tensor | None
    num_updates: Tensor
    num_skipped: Tensor
    lr: Tensor
    rule: str
    options: list[float]

    @property
    def rate(self) -> Any:
        return self.lr.item() if self.lr.dtype == torch.float64 else self.lr.reshape(())


def torch_optim_(*arguments: Any) -> None:
    """Does what ``optimizer.step()`` does to one parameter; takes the fields of ``_Update``."""
    update = _Update(*arguments)
    (_adam if update.rule == "adam" else _sgd)(update)
    update.num_updates.add_(1)
    update.num_skipped.add_(~update.grad.isfinite().all())


library.define(f"torch_optim_(Tensor(a!) values, Tensor grad, {_STATE.format(*(f'({x}!)' for x in 'bcdefg'))}) -> ()")
library.impl("torch_optim_", torch_optim_, "CompositeExplicitAutograd")


@torch.library.register_fake("smet::torch_optim_", lib=library)
def _(*args: Any) -> None:
    return None


def _adam(update: _Update) -> None:
    beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, fused = update.options
    assert update.first is not None and update.second is not None and update.step is not None
    adam(
        [update.values],
        [update.grad],
        [update.first],
        [update.second],
        [] if update.largest is None else [update.largest],
        [update.step],
        foreach=False,
        fused=bool(fused),
        amsgrad=bool(amsgrad),
        beta1=beta1,
        beta2=beta2,
        lr=update.rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=bool(maximize),
        decoupled_weight_decay=bool(decoupled),
    )


def _sgd(update: _Update) -> None:
    """Updates by SGD. torch has no buffer before its first update; ours is zero, which dampening would notice."""
    momentum, dampening, weight_decay, nesterov, maximize, fused = update.options
    is_new = update.first is not None and dampening != 0 and int(update.num_updates) == 0
    buffers = [None if is_new else update.first]
    sgd(
        [update.values],
        [update.grad],
        buffers,
        foreach=False,
        fused=bool(fused),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=update.rate,
        dampening=dampening,
        nesterov=bool(nesterov),
        maximize=bool(maximize),
    )
    if is_new and update.first is not None and buffers[0] is not None:
        update.first.copy_(buffers[0])
