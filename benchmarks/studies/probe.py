"""The loss of one fixed batch at every step around topology updates, and in windows without one.

For an update after step u the values are L[0], taken after the optimizer's step u and before blocks are dropped and
grown; D, right after; and L[1] to L[10], after each of the next ten optimizer steps.

- rise: max(L[1..10]) - L[0], negative where the loss only falls
- bump: the sum over the ten steps of max(0, L[k] - L[0])
- jump: D - L[0], what dropping alone does, before the optimizer has moved anything

A control window is the same ten steps where nothing is dropped: it begins half-way between two updates. In a run whose
topology never moves windows begin at the same steps, all of them controls. None begins in the first 40% of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.studies.case import Case
from benchmarks.studies.corpus import Corpus

LENGTH = 10
FIRST_FRACTION = 0.4
_STATIC_PERIOD = 100
_PROBE_SIZE = 8


@dataclass
class Window:
    """One stretch of the loss. ``is_control``: without an update; ``losses``: L[0..10]; ``after_drop``: D."""

    step: int
    is_control: bool
    losses: list[float] = field(default_factory=list)
    after_drop: float | None = None

    @property
    def is_open(self) -> bool:
        return len(self.losses) <= LENGTH

    @property
    def rise(self) -> float:
        return max(self.losses[1:]) - self.losses[0]

    @property
    def bump(self) -> float:
        return sum(max(0.0, loss - self.losses[0]) for loss in self.losses[1:])

    @property
    def jump(self) -> float | None:
        return None if self.after_drop is None else self.after_drop - self.losses[0]


class Probe:
    """Watches one run; ``windows`` holds what it saw."""

    def __init__(self, case: Case, model: nn.Module, corpus: Corpus) -> None:
        self._case, self._model = case, model
        self._batch = corpus.held_out(_PROBE_SIZE).to(case.shape.device)
        self._period = case.every or _STATIC_PERIOD
        self.windows: list[Window] = []

    @torch.no_grad()
    def _loss(self) -> float:
        return float(self._model(input_ids=self._batch, labels=self._batch).loss)

    def _begins(self, step: int) -> bool:
        late = FIRST_FRACTION * self._case.steps <= step <= self._case.steps - LENGTH
        return late and step % self._period in (0, self._period // 2)

    def before_update(self, step: int) -> None:
        """Call after the optimizer's step ``step`` (from 1)."""
        if self._begins(step):
            is_control = not self._case.every or step % self._period != 0
            self.windows.append(Window(step, is_control))
        unfinished = [window for window in self.windows if window.is_open]
        if unfinished:
            loss = self._loss()
            for window in unfinished:
                window.losses.append(loss)

    def after_update(self, step: int) -> None:
        """Call after the manager's step ``step``."""
        if self.windows and self.windows[-1].step == step and not self.windows[-1].is_control:
            self.windows[-1].after_drop = self._loss()
