"""Optimizers round other optimizers, written as public code writes them."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lookahead(Optimizer):
    """Keeps slow weights in its own state, and has groups of its own."""

    def __init__(self, base: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.base, self.k, self.alpha, self.count = base, k, alpha, 0
        super().__init__([p for group in base.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.count += 1
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            if self.count % self.k == 0:
                slow.lerp_(p, self.alpha)
                p.copy_(slow)


class LookaheadInside(Optimizer):
    """Keeps slow weights in the inner optimizer's state, from the k-th step on; never calls Optimizer.__init__."""

    def __init__(self, base_optimizer: Optimizer, k: int = 3) -> None:
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        for group in self.param_groups:
            group["lookahead_k"], group["lookahead_step"] = k, 0

    @property
    def state(self) -> Any:
        return self._base_optimizer.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._base_optimizer.step(closure)
        for group in self.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["lookahead_k"] == 0:
                for p in group["params"]:
                    slow = self.state[p].setdefault("slow", p.detach().clone())
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class LookaheadInLists(Optimizer):
    """Keeps slow weights in a list, which is no optimizer's state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = defaultdict(dict)
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class SAM(Optimizer):
    """Makes two steps, and makes its copy of a weight the weight."""

    def __init__(
        self, params: Any, base_optimizer: Callable[..., Optimizer], rho: float = 0.05, **options: Any
    ) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                climb = p.grad * group["rho"] / (norm + 1e-12)
                self.state[p]["old_p"] = p.data.clone()
                self.state[p]["climb"] = climb
                p.add_(climb)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError("call first_step and second_step")


class Bag:
    """Holds several optimizers deep in a container, and is none itself."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.pool = {"all": list(optimizers)}

    def step(self) -> None:
        for optimizer in self.pool["all"]:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.pool["all"]:
            optimizer.zero_grad()


class Bound(Optimizer):
    """Keeps a method of the optimizer that it wraps, and not the optimizer."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.go = inner.step

    def step(self, closure: Any = None) -> None:
        self.go()


class Proxy:
    """Hands everything on to what it wraps."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":
            raise AttributeError(name)
        return getattr(self._optimizer, name)


class Known(Bound):
    """Is known to the optimizer that it wraps."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.inner, inner.outer = inner, self


class OfParent(torch.optim.AdamW):
    """Its step is that of its parent, whose hooks run too once a parent was made."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OnesAtFirst(Optimizer):
    """Has a state that starts at a number of its own, and a constructor that takes more than options."""

    def __init__(self, name: str, params: Any) -> None:
        self.label = name
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            trust = self.state[p].setdefault("trust", torch.ones_like(p))
            trust.mul_(0.5)
            p.sub_(trust * p.grad, alpha=1e-2)


class Unanswering(OnesAtFirst):
    """Cannot be made a second time: its step needs an object that only the constructor is given."""

    def __init__(self, generator: torch.Generator, params: Any) -> None:
        super().__init__("", params)
        self.generator = generator

    def step(self, closure: Any = None) -> None:
        torch.rand((), generator=self.generator)
        super().step(closure)


def step_in_two(optimizer: SAM, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    optimizer.first_step()
    loss().backward()
    optimizer.second_step()
    optimizer.zero_grad()
