"""torch_optim_: one update of one parameter by torch.optim's AdamW, Adam or SGD, through their functional forms."""

from __future__ import annotations

from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

ADAM_OPTIONS = ("beta1", "beta2", "eps", "weight_decay", "decoupled", "amsgrad", "maximize", "fused")
SGD_OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "fused")
"""What ``options`` holds, in this order; flags as 0 and 1."""


def torch_optim_(
    values: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    largest: Tensor | None,
    step: Tensor,
    num_updates: Tensor,
    num_skipped: Tensor,
    lr: Tensor,
    rule: str,
    options: list[float],
) -> None:
    """What ``optimizer.step()`` does to one parameter.

    Args:
        values, grad: of any one shape; ``values`` is updated.
        first, second, largest: exp_avg, exp_avg_sq and max_exp_avg_sq, or the momentum buffer; None where the
            optimizer keeps none. step: its step count.
        num_updates: int64 scalar, raised by one. num_skipped: raised by one where the gradient is not finite, which
            holds back the topology manager; the optimizer itself goes on, as it does in eager.
        lr: 0-d tensor. rule: "adam" or "sgd". options: ``ADAM_OPTIONS`` or ``SGD_OPTIONS``.
    """
    {"adam": _adam, "sgd": _sgd}[rule](values, grad, first, second, largest, step, num_updates, lr, options)
    num_updates += 1
    num_skipped += ~grad.isfinite().all()


def _adam(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    num_updates: Tensor,
    lr: Tensor,
    options: list[float],
) -> None:
    beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, fused = options
    assert exp_avg is not None and exp_avg_sq is not None
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
        lr=lr if fused else lr.item(),
        weight_decay=weight_decay,
        eps=eps,
        maximize=bool(maximize),
        decoupled_weight_decay=bool(decoupled),
    )


def _sgd(
    values: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    second: None,
    largest: None,
    step: Tensor,
    num_updates: Tensor,
    lr: Tensor,
    options: list[float],
) -> None:
    """The first update makes the momentum buffer, where torch finds none."""
    momentum, dampening, weight_decay, nesterov, maximize, fused = options
    first_time = momentum_buffer is not None and int(num_updates) == 0
    buffers = [None if first_time else momentum_buffer]
    sgd(
        [values],
        [grad],
        buffers,
        foreach=False,
        fused=bool(fused),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr.item(),
        dampening=dampening,
        nesterov=bool(nesterov),
        maximize=bool(maximize),
    )
    if first_time and momentum_buffer is not None and buffers[0] is not None:
        momentum_buffer.copy_(buffers[0])
