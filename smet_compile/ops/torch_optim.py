"""Registers torch_optim_: one update of one parameter by torch.optim's AdamW, Adam or SGD, in functional form."""

from __future__ import annotations

from typing import Any

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


def torch_optim_(
    values: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    largest: Tensor | None,
    step: Tensor | None,
    num_updates: Tensor,
    num_skipped: Tensor,
    lr: Tensor,
    rule: str,
    options: list[float],
) -> None:
    """Does what ``optimizer.step()`` does to one parameter.

    Args:
        values, grad: of any one shape; ``values`` is updated.
        first, second, largest, step: exp_avg, exp_avg_sq, max_exp_avg_sq and step count, or the momentum buffer;
            None where the optimizer keeps none.
        num_updates: int64 scalar, raised by one; 0 where the state is new. num_skipped: raised by one where the
            gradient is not finite, which holds back the topology manager; the optimizer goes on, as it does in eager.
        lr: of shape (1,); float64 stands for a Python number. rule: "adam" or "sgd". options: ``ADAM_OPTIONS`` or
            ``SGD_OPTIONS``.
    """
    rate = lr.item() if lr.dtype == torch.float64 else lr.reshape(())
    if rule == "adam":
        assert first is not None and second is not None and step is not None
        _adam(values, grad, first, second, largest, step, rate, options)
    else:
        _sgd(values, grad, first, num_updates, rate, options)
    num_updates += 1
    num_skipped += ~grad.isfinite().all()


library.define(f"torch_optim_(Tensor(a!) values, Tensor grad, {_STATE.format(*(f'({x}!)' for x in 'bcdefg'))}) -> ()")
library.impl("torch_optim_", torch_optim_, "CompositeExplicitAutograd")


@torch.library.register_fake("smet::torch_optim_", lib=library)
def _(*args: Any) -> None:
    return None


def _adam(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    lr: float | Tensor,
    options: list[float],
) -> None:
    beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, fused = options
    adam(
        [values],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [] if max_exp_avg_sq is None else [max_exp_avg_sq],
        [step],
        foreach=False,
        fused=bool(fused),
        amsgrad=bool(amsgrad),
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=bool(maximize),
        decoupled_weight_decay=bool(decoupled),
    )


def _sgd(
    values: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    num_updates: Tensor,
    lr: float | Tensor,
    options: list[float],
) -> None:
    """Updates by SGD. torch has no buffer before its first update; ours is zero, which dampening would notice."""
    momentum, dampening, weight_decay, nesterov, maximize, fused = options
    is_new = momentum_buffer is not None and dampening != 0 and int(num_updates) == 0
    buffers = [None if is_new else momentum_buffer]
    sgd(
        [values],
        [grad],
        buffers,
        foreach=False,
        fused=bool(fused),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,  # type: ignore[arg-type]
        dampening=dampening,
        nesterov=bool(nesterov),
        maximize=bool(maximize),
    )
    if is_new and momentum_buffer is not None and buffers[0] is not None:
        momentum_buffer.copy_(buffers[0])
