"""Holds the table of optimizer rules. Every test of ``test_rules`` tries each row; a new rule adds one row.

A row says the optimizer, and the same rule again in plain torch for a dense weight times a mask.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import smet_compile as smet
from smet_compile.optim import ActiveOptimizer
from tests.support.dense_twin import SmetAdamW, State, WarmRule, new_ages

HEAD = (41, 37)
"""Shape of the output head of ``RaggedNet``, by which its twin knows it."""


@dataclass(frozen=True)
class Row:
    """Describes one rule.

    Args:
        make: the optimizer of a model, with further options. twin: the same for dense weights, and warm-ups.
        slots: the names of its state: that of a compact weight, of the head, of a vector.
        warmup_steps: those that ``make`` asks for; without any, a rule that needs no ages keeps none.
    """

    make: Callable[..., ActiveOptimizer]
    twin: WarmRule
    slots: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    warmup_steps: int = 8


@dataclass(frozen=True)
class LionTwin(WarmRule):
    """Implements Lion as its paper defines it."""

    lr: float
    weight_decay: float

    def new_state(self, weight: Tensor) -> State:
        return {"m": torch.zeros_like(weight), **new_ages(weight)}

    def update(self, weight: Tensor, grad: Tensor, state: State, density: float | None) -> Tensor:
        state["age"] = state["age"] + 1
        step = torch.sign(0.9 * state["m"] + 0.1 * grad) + self.weight_decay * weight
        state["m"] = 0.99 * state["m"] + 0.01 * grad
        return weight - self.step_size(weight, state, self.lr, density, exponent=1.0) * step


@dataclass(frozen=True)
class SgdTwin(WarmRule):
    """Implements SGD with momentum, as torch defines it."""

    lr: float
    weight_decay: float
    nesterov: bool = False

    def new_state(self, weight: Tensor) -> State:
        return {"b": torch.zeros_like(weight), **new_ages(weight)}

    def update(self, weight: Tensor, grad: Tensor, state: State, density: float | None) -> Tensor:
        state["age"] = state["age"] + 1
        grad = grad + self.weight_decay * weight
        state["b"] = 0.9 * state["b"] + grad
        step = grad + 0.9 * state["b"] if self.nesterov else state["b"]
        return weight - self.step_size(weight, state, self.lr, density, exponent=0.0) * step


@dataclass(frozen=True)
class ScaleTwin(WarmRule):
    """Implements SCALE: normalized by output unit, with a mean for the head alone, and AdamW for vectors."""

    lr: float
    weight_decay: float

    @property
    def vectors(self) -> SmetAdamW:
        return SmetAdamW(self.lr, weight_decay=self.weight_decay)

    def new_state(self, weight: Tensor) -> State:
        if weight.dim() < 2:
            return self.vectors.new_state(weight)
        return {"m": torch.zeros_like(weight), **new_ages(weight)}

    def update(self, weight: Tensor, grad: Tensor, state: State, density: float | None) -> Tensor:
        if weight.dim() < 2:
            return self.vectors.update(weight, grad, state, density)
        state["age"] = state["age"] + 1
        state["m"] = 0.9 * state["m"] + 0.1 * grad if tuple(weight.shape) == HEAD else grad
        norm = state["m"].square().sum(-1, keepdim=True).sqrt()
        step = torch.where(norm > 0, state["m"] / norm, 0.0) + self.weight_decay * weight
        return weight - self.step_size(weight, state, self.lr, density, exponent=0.5) * step


ADAM = ("exp_avg", "exp_avg_sq")
ROWS: dict[str, Row] = {
    "adamw": Row(
        lambda model, **more: smet.ActiveAdamW(model, lr=2e-3, weight_decay=0.1, **{"warmup_steps": 8, **more}),
        SmetAdamW(2e-3, weight_decay=0.1, warmup_steps=8),
        (ADAM, ADAM, ADAM),
    ),
    "lion": Row(
        lambda model, **more: smet.ActiveLion(model, lr=1e-3, weight_decay=0.1, **{"warmup_steps": 8, **more}),
        LionTwin(1e-3, 0.1, warmup_steps=8),
        (("exp_avg",),) * 3,
    ),
    "sgd": Row(
        lambda model, **more: smet.ActiveSGD(model, lr=0.05, weight_decay=0.1, **{"warmup_steps": 8, **more}),
        SgdTwin(0.05, 0.1, warmup_steps=8),
        (("momentum_buffer",),) * 3,
    ),
    "sgd_nesterov": Row(
        lambda model, **more: smet.ActiveSGD(model, lr=0.05, nesterov=True, **{"warmup_steps": 8, **more}),
        SgdTwin(0.05, 0.0, nesterov=True, warmup_steps=8),
        (("momentum_buffer",),) * 3,
    ),
    "scale": Row(
        lambda model, **more: smet.ActiveScale(model, lr=5e-3, weight_decay=0.1, **more),
        ScaleTwin(5e-3, 0.1, warmup_steps=0),
        ((), ("exp_avg",), ADAM),
        warmup_steps=0,
    ),
}
