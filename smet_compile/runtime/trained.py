"""Which parameters an optimizer step trained, and which of their gradients were not finite."""

from __future__ import annotations

from typing import Any

from torch import nn

from smet_compile.ops.update_counts import UpdateCounts, counts_of


class Trained:
    """Looks at a step from within the optimizer's hook, while its gradients are there.

    A gradient that an update in backward consumed is there no more; what is left are the counts of such updates.
    They are read before and after a step that is looked at, and in no other: reading waits for the device.
    """

    def __init__(self) -> None:
        self._optimizers: list[Any] = []
        self._before: dict[nn.Parameter, tuple[UpdateCounts, tuple[int, int]]] = {}
        self._trained: dict[int, set[int]] = {}
        self._not_finite: dict[int, list[nn.Parameter]] = {}

    def watch(self, optimizers: list[Any]) -> None:
        """Says which optimizers count updates made in backward."""
        self._optimizers = optimizers

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return any(id(parameter) in trained for trained in self._trained.values())

    @property
    def not_finite(self) -> list[nn.Parameter]:
        """The trained parameters whose gradient was not finite."""
        return [p for each in self._not_finite.values() for p in each]

    def expect(self) -> None:
        """Before a step that will be looked at."""
        self._before = {p: (counts, counts.now()) for p, counts in self._counts().items()}

    def look(self, optimizer: Any) -> None:
        """After a step of one of the optimizers."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        counts = self._counts()
        moved = {p: self._moved(p, counts[p]) for p in held if p in counts}
        trained = [p for p in held if p.grad is not None or (p in moved and moved[p][0])]
        self._trained[id(optimizer)] = {id(p) for p in trained}
        self._not_finite[id(optimizer)] = [p for p in trained if (p in moved and moved[p][1]) or not _is_finite(p)]

    def forget(self) -> None:
        """Before the next training step."""
        self._trained.clear()
        self._not_finite.clear()

    def _counts(self) -> dict[nn.Parameter, UpdateCounts]:
        return {p: counts for optimizer in self._optimizers for p, counts in counts_of(optimizer).items()}

    def _moved(self, parameter: nn.Parameter, counts: UpdateCounts) -> tuple[bool, bool]:
        """Whether the parameter was updated in the step, and whether blocks were skipped."""
        known, before = self._before.get(parameter, (None, (0, 0)))
        if known is not counts:
            before = counts.at_first()
        now = counts.now()
        return now[0] > before[0], now[1] > before[1]


def _is_finite(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(parameter.grad.isfinite().all())
