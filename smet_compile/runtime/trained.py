"""Which parameters an optimizer step trained, and which of their gradients were not finite."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from smet_compile.ops.update_counts import UpdateCounts, counts_of


class Trained:
    """Looks at a step from within the optimizer's hook, while its gradients are there.

    A gradient that an update in backward consumed is there no more; what is left are the counts of such updates.
    They are read before and after a step that is looked at, and in no other: reading waits for the device.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: dict[nn.Parameter, tuple[UpdateCounts, tuple[int, int]]] = {}
        self._trained: set[int] = set()
        self.not_finite: list[nn.Parameter] = []

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._trained

    def expect(self) -> None:
        """Before a step that will be looked at."""
        self._before = {p: (counts, counts.now()) for p, counts in counts_of(self._optimizer).items()}

    def look(self) -> None:
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        counts = counts_of(self._optimizer)
        moved = {p: self._moved(p, counts[p]) for p in held if p in counts}
        trained = [p for p in held if p.grad is not None or (p in moved and moved[p][0])]
        self._trained = {id(p) for p in trained}
        self.not_finite = [p for p in trained if (p in moved and moved[p][1]) or not _is_finite(p)]

    def _moved(self, parameter: nn.Parameter, counts: UpdateCounts) -> tuple[bool, bool]:
        """Whether the parameter was updated in the step, and whether blocks were skipped."""
        known, before = self._before.get(parameter, (None, (0, 0)))
        if known is not counts:
            before = counts.at_first()
        now = counts.now()
        return now[0] > before[0], now[1] > before[1]


def _is_finite(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(parameter.grad.isfinite().all())
