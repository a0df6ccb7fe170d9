"""The steps that optimizers made since the manager's last one: how many of each, and when each steps again."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from smet_compile.ops import canonical_name
from smet_compile.ops.loaded import check_integer, check_keys, check_names, kind_of
from smet_compile.ops.optimizers import FoundOptimizer
from smet_compile.runtime.optimizer_steps import TrainedParameters


class NewSteps:
    """Counts the steps that each optimizer made since the manager's last one, and knows how often each steps.

    A state dict has the steps of each parameter's optimizer, so that optimizers may be found in any order.

    Attributes:
        of: the number of steps by the id of the optimizer. num: that of the optimizer that made most of them.
        num_last: the number that the manager's last step counted.
    """

    def __init__(self) -> None:
        self.of: Counter[int] = Counter()
        self.num = 0
        self.num_last = 1
        self._last: dict[int, int] = {}
        self._gap: dict[int, int] = {}

    def add(self, optimizer: Any, num_steps: int, is_alone: bool) -> int:
        """Counts a step of ``optimizer``, beside ``num_steps`` that the manager has counted.

        Returns the last step of the run before the optimizer is expected to step again: that depends on the steps
        between its last two. After its first step nothing is known, and that is the end of time, unless it is the only
        optimizer.
        """
        key = id(optimizer)
        self.of[key] += 1
        self.num = max(self.num, self.of[key])
        step, before = num_steps + self.num, self._last.get(key)
        self._last[key] = step
        self._gap[key] = 1 if before is None else max(1, step - before)
        return sys.maxsize if before is None and not is_alone else step + self._gap[key] - 1

    def next_looked_at(self, num_steps: int) -> int:
        """Returns the last step up to which ``add`` may tell after the next step of any optimizer that has stepped."""
        step = num_steps + self.num
        return step + max((max(self._gap[key], step + 1 - last) for key, last in self._last.items()), default=1)

    def begin_anew(self) -> None:
        """Notes that the manager made a step of those that are counted."""
        self.of.clear()
        self.num, self.num_last = 0, self.num

    def state_dict(
        self, model: nn.Module, stepping: Iterable[FoundOptimizer], trained: TrainedParameters
    ) -> dict[str, Any]:
        """Returns the counts, and what is known of these steps, by the names of parameters."""
        names, not_finite = _names_of(model), {id(p) for p in trained.not_finite}
        counts = {}
        for found in stepping:
            key = id(found.optimizer)
            if key in self._last:
                own = {"num": self.of[key], "last": self._last[key], "gap": self._gap[key]}
                counts.update({name: dict(own) for each, name in names.items() if each in found.steps})
        return {
            "num": self.num,
            "num_last": self.num_last,
            "of": counts,
            "trained": [name for key, name in names.items() if key in trained.ids],
            "not_finite": [name for key, name in names.items() if key in not_finite],
        }

    def load_state_dict(
        self, state: dict[str, Any], model: nn.Module, stepping: Iterable[FoundOptimizer], trained: TrainedParameters
    ) -> None:
        """Goes on from a state that ``check_state_dict`` accepts."""
        names, parameters = _names_of(model), {id(p): p for p in model.parameters()}
        self.num, self.num_last = state["num"], state["num_last"]
        self.of, self._last, self._gap = Counter(), {}, {}
        trained.start_anew()
        for found in stepping:
            key = id(found.optimizer)
            own = {names[each] for each in names if each in found.steps}
            counts = next((counts for name, counts in state["of"].items() if name in own), None)
            if counts is not None:
                self.of[key], self._last[key], self._gap[key] = counts["num"], counts["last"], counts["gap"]
            known, broken = (
                [parameters[each] for each, name in names.items() if name in own and name in state[part]]
                for part in ("trained", "not_finite")
            )
            trained.set_step(found.optimizer, known, broken)

    def check_state_dict(self, state: Any, model: nn.Module, num_steps: int) -> None:
        """Raises ValueError where ``state`` cannot be that of the optimizers of this model."""
        check_keys("new_steps", state, ("num", "num_last", "of", "trained", "not_finite"))
        names = set(_names_of(model).values())
        check_integer("new_steps.num", state["num"])
        check_integer("new_steps.num_last", state["num_last"], 1)
        check_names("new_steps.of", state["of"], names)
        for name, counts in state["of"].items():
            where = f"new_steps.of[{name!r}]"
            check_keys(where, counts, ("num", "last", "gap"))
            check_integer(f"{where}.num", counts["num"], 0, state["num"])
            check_integer(f"{where}.last", counts["last"], 1, num_steps + state["num"])
            check_integer(f"{where}.gap", counts["gap"], 1, max(1, counts["last"]))
        for part in ("trained", "not_finite"):
            if not isinstance(state[part], list):
                raise ValueError(f"new_steps.{part}: expected a list of names, got {kind_of(state[part])}")
            for name in state[part]:
                if name not in names:
                    raise ValueError(f"new_steps.{part}: expected names of parameters of the model, got {name!r:.80}")


def _names_of(model: nn.Module) -> dict[int, str]:
    """Returns the canonical name of each parameter by its id."""
    return {id(parameter): canonical_name(model, name) for name, parameter in model.named_parameters()}
