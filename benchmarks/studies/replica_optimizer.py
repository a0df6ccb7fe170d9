"""Makes the AdamW steps of many models at once, weights being dense and masked.

The rules are those of `smet_compile.optim.adamw` and, with bias correction by the step count, of its naive variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


@dataclass
class Moments:
    """Holds a stacked parameter (E, ...) and its moments."""

    weight: Tensor
    first: Tensor
    second: Tensor


@dataclass
class Masked(Moments):
    """Holds a stacked linear weight (E, R, C), which of its entries are active, and the steps they were born after.

    Args:
        rate: α d^(-p) of each model, (E, 1, 1). first_warmup: W of the entries that are active from the start.
    """

    mask: Tensor
    births: Tensor
    rate: Tensor
    first_warmup: Tensor


@dataclass(frozen=True)
class Aging:
    """Tells for each model (E, 1, 1) whether its bias corrections go by age, and W of newcomers."""

    local: Tensor
    warmup: Tensor


def step_masked(parts: Sequence[Masked], grads: Sequence[Tensor], aging: Aging, time: Tensor, factor: Tensor) -> None:
    """Makes step ``time`` (from 1) of active entries; the others stay zero. ``factor`` scales all rates."""
    for part, grad in zip(parts, grads, strict=True):
        age = time - part.births
        direction = _direction(part, torch.where(part.mask, grad, 0.0), torch.where(aging.local, age, time))
        steps = torch.where(part.births > 0, aging.warmup, part.first_warmup)
        warm = torch.where(steps > 0, (age / steps.clamp(min=1)).clamp(max=1.0), 1.0)
        part.weight.copy_(torch.where(part.mask, part.weight - part.rate * factor * warm * direction, 0.0))


def step_plain(parts: Sequence[Moments], grads: Sequence[Tensor], rates: Tensor, time: Tensor, factor: Tensor) -> None:
    """Makes step ``time`` of parameters without blocks, at the rates (E,)."""
    for part, grad in zip(parts, grads, strict=True):
        rate = rates.view(-1, *[1] * (grad.dim() - 1))
        part.weight.sub_(rate * factor * _direction(part, grad, time))


def _direction(part: Moments, grad: Tensor, age: Tensor) -> Tensor:
    part.first.copy_(part.first + (1 - _BETA1) * (grad - part.first))
    part.second.copy_(_BETA2 * part.second + (1 - _BETA2) * grad * grad)
    bias1, bias2 = -torch.expm1(age * math.log(_BETA1)), -torch.expm1(age * math.log(_BETA2))
    return (part.first / bias1) / ((part.second / bias2).sqrt() + _EPS)
