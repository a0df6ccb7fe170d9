"""Saves and restores what a resumed run needs of a topology manager."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from smet_compile.ops import Site
from smet_compile.ops.loaded import check_integer, check_keys, check_number
from smet_compile.runtime.collecting import GradientCollection
from smet_compile.runtime.history import TopologyEvent, Trace, check_history
from smet_compile.runtime.optimizer_steps import TrainedParameters
from smet_compile.runtime.settings import check_override, check_settings
from smet_compile.runtime.stages import DensityStages

MOST_POSTPONED_STEPS = 10
"""Number of steps for which an update waits for finite gradients."""


class SavedManager:
    """Knows the state of a ``TopologyManager``, which derives from it."""

    sites: dict[str, Site]
    history: list[TopologyEvent]
    num_steps: int
    _settings: dict[str, Any]
    _num_postponed: int
    _num_new_steps: int
    _owed: dict[str, float]
    _moving: dict[str, Site]
    _collection: GradientCollection
    _stages: DensityStages
    _trace: Trace
    _trained: TrainedParameters

    def _prepare_next_step(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns settings, steps counted, history, and which blocks were ever active, as a resumed run needs them."""
        return {
            "settings": dict(self._settings),
            "num_steps": self.num_steps,
            "num_postponed": self._num_postponed,
            "owed": dict(self._owed),
            "collected": self._collection.state_dict(),
            "history": [event.to_dict() for event in self.history],
            "trace": self._trace.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, override: Iterable[str] = ()) -> None:
        """Continues from a saved ``state_dict``; the model and optimizer are loaded on their own.

        Args:
            override: names of settings (``"total_steps"``, ``"every"``, ...) that may differ from those of the saved
                run; it then goes on with this manager's.

        Raises:
            ValueError: ``state`` is of another model, was made with other settings, or is not whole. Nothing has then
                changed.
        """
        self.check_state_dict(state, override=override)
        self.num_steps = state["num_steps"]
        self._num_new_steps = 0
        self._owed = {name: float(blocks) for name, blocks in state["owed"].items()}
        self._num_postponed = state["num_postponed"] if self._moving else 0
        self.history = [TopologyEvent.from_dict(event) for event in state["history"]]
        self._trace.load_state_dict(state["trace"])
        self._stages.resume(self.num_steps)
        self._prepare_next_step()
        self._collection.load_state_dict(state["collected"])

    def check_state_dict(self, state: dict[str, Any], *, override: Iterable[str] = ()) -> None:
        """Raises ValueError where ``load_state_dict`` would."""
        parts = ("num_steps", "num_postponed", "owed", "collected", "history", "trace")
        check_keys("manager", state, parts, ("settings",))
        check_settings(state.get("settings", {}), self._settings, override)
        check_integer("num_steps", state["num_steps"])
        check_integer("num_postponed", state["num_postponed"], 0, MOST_POSTPONED_STEPS - 1)
        check_keys("owed", state["owed"], self.sites.keys())
        for name, blocks in state["owed"].items():
            check_number(f"owed[{name!r}]", blocks, 0, 1)
        num_steps = state["num_steps"]
        self._collection.check_state_dict(state["collected"], self._stages.growth_after(num_steps))
        counts = check_history(state["history"], num_steps, self.sites)
        if "density_schedule" not in check_override(override):
            self._stages.check_state({name: each[0] for name, each in counts.items()}, num_steps)
        self._trace.check_state_dict(state["trace"], num_steps, counts)

    def parts_of_state(self) -> list[dict[str, Any]]:
        """Returns the dicts that hold what ``load_state_dict`` changes, for whoever has to put it back."""
        parts = self._trace, self._trained, self._stages
        return [self.__dict__, *(part.__dict__ for part in parts), *self._collection.parts_of_state()]
