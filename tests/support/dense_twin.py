"""Defines the dense twin, the oracle for sparse training, in plain torch without importing the library.

It trains a dense model whose sites are `weight * mask`; optimizer states are dense, ages int64 per weight.
Where growth is random it is told the new mask and judges whether it was allowed; all else it computes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.support.blocks import Grid

State = dict[str, Tensor]


class Rule(Protocol):
    def new_state(self, weight: Tensor) -> State: ...
    def update(self, weight: Tensor, grad: Tensor, state: State, density: float | None) -> Tensor: ...


def new_ages(weight: Tensor) -> State:
    """Returns ages of 0; ``initial`` marks the weights that have been active since the start."""
    return {"age": torch.zeros(weight.shape, dtype=torch.int64), "initial": torch.ones_like(weight, dtype=torch.bool)}


@dataclass(frozen=True, kw_only=True)
class WarmRule(ABC):
    """Holds the two warm-ups of a rule: of grown weights, and of initial ones (None: the same)."""

    warmup_steps: int = 100
    initial_warmup_steps: int | None = None

    @abstractmethod
    def new_state(self, weight: Tensor) -> State: ...

    @abstractmethod
    def update(self, weight: Tensor, grad: Tensor, state: State, density: float | None) -> Tensor: ...

    def step_size(self, weight: Tensor, state: State, lr: float, density: float | None, exponent: float) -> Tensor:
        """Returns lr d^(-p) min(1, age / W); a plain parameter has no density and no warm-up."""
        rate = torch.full_like(weight, lr)
        if density is None:
            return rate
        rate = rate * density**-exponent
        initial = self.warmup_steps if self.initial_warmup_steps is None else self.initial_warmup_steps
        for steps, these in ((initial, state["initial"]), (self.warmup_steps, ~state["initial"])):
            if steps:
                rate = torch.where(these, rate * torch.clamp(state["age"].double() / steps, max=1.0), rate)
        return rate


@dataclass(frozen=True)
class SgdMomentum:
    """Does what torch.optim.SGD does: b <- mu b + g, w <- w - lr b."""

    lr: float
    momentum: float

    def new_state(self, weight: Tensor) -> State:
        return {"momentum": torch.zeros_like(weight)}

    def update(self, weight: Tensor, grad: Tensor, state: State, density: float | None) -> Tensor:
        state["momentum"] = self.momentum * state["momentum"] + grad
        return weight - self.lr * state["momentum"]


@dataclass(frozen=True)
class SmetAdamW(WarmRule):
    """Implements SMET's rule with one age per weight; `density` None is a plain parameter: AdamW, no warm-up."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    exponent: float = 1.0

    def new_state(self, weight: Tensor) -> State:
        return {"m": torch.zeros_like(weight), "v": torch.zeros_like(weight), **new_ages(weight)}

    def update(self, weight: Tensor, grad: Tensor, state: State, density: float | None) -> Tensor:
        beta1, beta2 = self.betas
        state["age"] = state["age"] + 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * grad
        state["v"] = beta2 * state["v"] + (1 - beta2) * grad**2
        age = state["age"].double()
        mean = state["m"] / (1 - beta1**age)
        square = state["v"] / (1 - beta2**age)
        rate = self.step_size(weight, state, self.lr, density, self.exponent)
        return weight - rate * (mean / (square.sqrt() + self.eps) + self.weight_decay * weight)


@dataclass
class TwinSite:
    grid: Grid
    mask: Tensor
    mean_grad: Tensor | None = None
    owed: Fraction = Fraction(0)
    grown_at: dict[int, Tensor] = field(default_factory=dict)

    @property
    def active(self) -> Tensor:
        return self.grid.spread(self.mask)

    @property
    def density(self) -> float:
        return int(self.mask.sum()) / self.grid.num_blocks


@dataclass
class DenseTwin:
    model: nn.Module
    sites: dict[str, TwinSite]
    rule: Rule
    loss_of: Callable[[Any, Any], Tensor] = lambda output, target: (output - target).square().mean()
    weights: dict[str, Tensor] = field(init=False)
    states: dict[str, State] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for name, site in self.sites.items():
            self.weights[name] = self.weights[name] * site.active
        self.states = {name: self.rule.new_state(w) for name, w in self.weights.items()}

    def gradients(self, inputs: Tensor, target: Tensor) -> tuple[float, dict[str, Tensor]]:
        leaves = {name: w.clone().requires_grad_() for name, w in self.weights.items()}
        loss = self.loss_of(functional_call(self.model, leaves, (inputs,)), target)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), dict(zip(leaves, grads, strict=True))

    def step(self, inputs: Tensor, target: Tensor) -> float:
        loss, grads = self.gradients(inputs, target)
        for name, grad in grads.items():
            self.apply(name, grad)
        return loss

    def apply(self, name: str, dense_grad: Tensor) -> None:
        site = self.sites.get(name)
        if site is None:
            self.weights[name] = self.rule.update(self.weights[name], dense_grad, self.states[name], None)
            return
        site.mean_grad = site.grid.mean(dense_grad.abs())
        grad = dense_grad * site.active
        weight = self.rule.update(self.weights[name], grad, self.states[name], site.density)
        self.weights[name] = torch.where(site.active, weight, torch.zeros_like(weight))

    def change_topology(
        self, name: str, drop_fraction: float, new_mask: Tensor, grow: str, step: int, min_age: int
    ) -> None:
        """Drops drop_fraction of the blocks, and what earlier updates left of a block; grows as many."""
        site = self.sites[name]
        site.owed += Fraction(drop_fraction) * int(site.mask.sum())
        num_drop = int(site.owed + Fraction(1, 10**9))
        site.owed -= num_drop
        young = [mask for born, mask in site.grown_at.items() if step - born < min_age]
        may_go = site.mask & ~torch.stack([torch.zeros_like(site.mask), *young]).any(0)
        kept = site.mask & ~self.least(name, num_drop, may_go)
        if grow == "gradient":
            grown = self.steepest(name, num_drop)
            assert torch.equal(new_mask, kept | grown), f"{name}: grown set is not that of the largest gradients"
        else:
            grown = new_mask & ~site.mask
            assert torch.equal(new_mask & site.mask, kept), f"{name}: the smallest weights were not dropped"
            assert int(grown.sum()) == num_drop, f"{name}: grew {int(grown.sum())}, dropped {num_drop}"
        site.grown_at[step] = grown & ~site.mask
        self.renew(name, kept | grown, kept)

    def least(self, name: str, count: int, may_go: Tensor) -> Tensor:
        site = self.sites[name]
        scores = site.grid.mean(self.weights[name].abs()).masked_fill(~may_go, torch.inf)
        return marked(scores.topk(count, largest=False).indices, site.mask)

    def steepest(self, name: str, count: int) -> Tensor:
        site = self.sites[name]
        assert site.mean_grad is not None
        scores = site.mean_grad.masked_fill(site.mask, -torch.inf)
        return marked(scores.topk(count).indices, site.mask)

    def renew(self, name: str, new_mask: Tensor, kept: Tensor) -> None:
        site = self.sites[name]
        survives = site.grid.spread(kept)
        self.weights[name] = self.weights[name] * survives
        self.states[name] = {key: state * survives for key, state in self.states[name].items()}
        site.mask = new_mask


def marked(indices: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros_like(like)
    mask[indices] = True
    return mask
