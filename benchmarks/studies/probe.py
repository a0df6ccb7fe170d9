"""Measures the loss of one fixed batch at every step after a topology update, and without the update.

Before the update the run is copied. The copy goes on for ten steps on the same batches with the topology as it was: its
losses are what would have been. With L[0] the loss of the probe batch after the optimizer's step u, before blocks are
dropped and grown; D right after; and L[1] to L[10] after each of the next ten optimizer steps:

- rise: max(L[1..10]) - L[0]
- bump: the sum over the ten steps of max(0, L[k] - L[0])
- jump: D - L[0], what dropping alone does, before the optimizer has moved anything

and what counts is rise and bump with the update less rise and bump without. Half-way between two updates there are
windows without an update in either, which say what the copy alone changes. None begins in the first 40% of a run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

LENGTH = 10
FIRST_FRACTION = 0.4
Advance = Callable[[nn.Module, Optimizer, int], object]


@dataclass
class Window:
    """Holds ten steps after step ``step``, of the run and of its copy.

    Args:
        is_null: no update was made here.
        losses, without: L[0..10] of the run, and of the copy that was not updated.
        after_drop: D.
    """

    step: int
    is_null: bool
    losses: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    after_drop: float | None = None

    @property
    def is_open(self) -> bool:
        return len(self.losses) <= LENGTH

    @property
    def rise(self) -> float:
        """Returns the value with the update less that without."""
        return rise(self.losses) - rise(self.without)

    @property
    def bump(self) -> float:
        """Returns the value with the update less that without."""
        return bump(self.losses) - bump(self.without)

    @property
    def jump(self) -> float | None:
        return None if self.after_drop is None else self.after_drop - self.losses[0]


def rise(losses: list[float]) -> float:
    return max(losses[1:]) - losses[0]


def bump(losses: list[float]) -> float:
    return sum(max(0.0, loss - losses[0]) for loss in losses[1:])


class Probe:
    """Watches a run whose topology moves every ``every`` of ``steps`` steps; ``windows`` holds what it saw.

    ``batch`` is a (size, sequence) batch of tokens; ``advance(model, optimizer, step)`` trains a copy for one step.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, batch: torch.Tensor, advance: Advance, every: int, steps: int
    ) -> None:
        self._model, self._optimizer, self._batch, self._advance = model, optimizer, batch, advance
        self._every, self._steps = every, steps
        self.windows: list[Window] = []

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        return float(model(input_ids=self._batch, labels=self._batch).loss)

    def _begins(self, step: int) -> bool:
        late = FIRST_FRACTION * self._steps <= step <= self._steps - LENGTH
        at_update, half_way = step % self._every == 0, step % self._every == self._every // 2
        return late and (at_update or (half_way and self._every > 4 * LENGTH))

    def before_update(self, step: int) -> None:
        """Begins or continues windows; to be called after the optimizer's step ``step`` (from 1)."""
        if self._begins(step):
            self.windows.append(Window(step, step % self._every != 0))
        unfinished = [window for window in self.windows if window.is_open]
        if unfinished:
            loss = self._loss(self._model)
            for window in unfinished:
                window.losses.append(loss)
        if self.windows and self.windows[-1].step == step:
            self.windows[-1].without = [loss, *self._losses_without(step)]

    def _losses_without(self, step: int) -> list[float]:
        model, optimizer = copy.deepcopy((self._model, self._optimizer))
        losses = []
        for later in range(step, step + LENGTH):
            self._advance(model, optimizer, later)
            losses.append(self._loss(model))
        return losses

    def after_update(self, step: int) -> None:
        """Measures the loss right after an update; to be called after the manager's step ``step``."""
        if self.windows and self.windows[-1].step == step and not self.windows[-1].is_null:
            self.windows[-1].after_drop = self._loss(self._model)
