"""Saves and restores what a resumed run needs of a topology manager."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from smet_compile.format import TopologyChange
from smet_compile.ops import Site
from smet_compile.ops.following import Load, Mover
from smet_compile.ops.loaded import check_integer, check_keys, check_names, check_number
from smet_compile.runtime.collecting import GradientCollection
from smet_compile.runtime.history import TopologyEvent, Trace, check_history, step_of_last_load
from smet_compile.runtime.managed_optimizers import ManagedOptimizers
from smet_compile.runtime.new_steps import NewSteps
from smet_compile.runtime.optimizer_steps import TrainedParameters
from smet_compile.runtime.settings import check_override, check_settings
from smet_compile.runtime.stages import DensityStages

MOST_POSTPONED_STEPS = 10
"""Number of steps for which an update waits for finite gradients."""
_NO_NEW_STEPS: dict[str, Any] = {"num": 0, "num_last": 1, "of": {}, "trained": [], "not_finite": []}


def _move_nothing(_: TopologyChange) -> None:
    """Moves the state of a weight that has none."""


class SavedManager:
    """Knows the state of a ``TopologyManager``, which derives from it."""

    model: nn.Module
    sites: dict[str, Site]
    history: list[TopologyEvent]
    num_steps: int
    _settings: dict[str, Any]
    _num_postponed: int
    _new_steps: NewSteps
    _owed: dict[str, float]
    _awaited: dict[str, int]
    """The weights whose topology is expected next, since the record of it was loaded, and the step of that."""
    _moving: dict[str, Site]
    _collection: GradientCollection
    _stages: DensityStages
    _optimizers: ManagedOptimizers
    _trace: Trace
    _trained: TrainedParameters

    def _prepare_next_step(self) -> None:
        raise NotImplementedError

    def _read_counts(self) -> None:
        raise NotImplementedError

    def _is_due(self, step: int) -> bool:
        raise NotImplementedError

    def _is_near(self) -> bool:
        """Tells whether gradients are collected in the next step; notes how many blocks the next stage grows."""
        self._collection.growth = self._stages.growth_after(self.num_steps, self._new_steps.num_last)
        upcoming = self.num_steps + self._collection.window - 1 + self._new_steps.num_last
        return self._collection.window > 0 and self._is_due(upcoming)

    def state_dict(self) -> dict[str, Any]:
        """Returns settings, steps counted, history, and which blocks were ever active, as a resumed run needs them."""
        return {
            "settings": dict(self._settings),
            "num_steps": self.num_steps,
            "num_postponed": self._num_postponed,
            "new_steps": self._new_steps.state_dict(self.model, self._optimizers.stepping, self._trained),
            "owed": dict(self._owed),
            "collected": self._collection.state_dict(within_step=self._new_steps.num > 0),
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
        new_steps = state.get("new_steps", _NO_NEW_STEPS)
        self._new_steps.load_state_dict(new_steps, self.model, self._optimizers.stepping, self._trained)
        self._owed = {name: float(blocks) for name, blocks in state["owed"].items()}
        self._num_postponed = state["num_postponed"] if self._moving else 0
        self.history = [TopologyEvent.from_dict(event) for event in state["history"]]
        self._trace.load_state_dict(state["trace"])
        self._stages.resume(self.num_steps)
        self._prepare_next_step()
        self._collection.load_state_dict(state["collected"])
        self._awaited = dict.fromkeys(self.sites, self.num_steps + self._new_steps.num)

    def record_load(self, load: Load) -> None:
        """Notes a topology that was loaded into a weight, unless the record of it was loaded since the last step."""
        site = self._site_of(load.values)
        if site is None:
            return
        is_awaited = self._awaited.pop(site.name, None) == self.num_steps + self._new_steps.num
        if load.resizes:  # a record that was loaded is of another number of blocks
            self._record_resize(site, load)
        elif load.changes and not is_awaited:
            bits = site.bits_of_whole(load.after).cpu()
            self._trace.follow(site.name, bits, is_start=not (self.history or self.num_steps))
            self._collection.forget(site.name)

    def _record_resize(self, site: Site, load: Load) -> None:
        """Notes that a weight has the number of blocks of another stage now: the stage of this step is due again."""
        assert load.before is not None, "a weight without data is resized before anything is noted"
        before, after = (site.bits_of_whole(bits).cpu() for bits in (load.before, load.after))
        made = {site.name: self._trace.record_load(site.name, before, after)}
        last = self.history[-1] if self.history else None
        if last is not None and last.is_load and last.step == self.num_steps and site.name not in last.sites:
            made = last.sites | made
            self.history.pop()
        density = sum(each.num_active for each in made.values()) / sum(each.num_blocks for each in made.values())
        self.history.append(TopologyEvent(self.num_steps, 0.0, made, density, is_load=True))
        self._stages.resume(self.num_steps)
        self._collection.renew(site.name, self._is_near())
        self._read_counts()

    def holders_of(self, values: nn.Parameter) -> list[Any]:
        """Returns the optimizers that hold ``values``, wrappers among them."""
        return [each.optimizer for each in self._optimizers.found if id(values) in each.holds]

    def find_mover(self, values: nn.Parameter) -> Mover:
        """Returns what moves the state that the optimizers keep for a weight; ValueError where it cannot follow."""
        site = self._site_of(values)
        if site is None or not any(each.state_of(values) for each in self._optimizers.found):
            return _move_nothing
        self._optimizers.find()
        return partial(self._optimizers.state.follow, site)

    def _site_of(self, values: nn.Parameter) -> Site | None:
        return next((site for site in self.sites.values() if site.values_maybe is values), None)

    def check_state_dict(self, state: dict[str, Any], *, override: Iterable[str] = ()) -> None:
        """Raises ValueError where ``load_state_dict`` would."""
        parts = ("num_steps", "num_postponed", "owed", "collected", "history", "trace")
        check_keys("manager", state, parts, ("settings", "new_steps"))  # older versions did not save these
        check_settings(state.get("settings", {}), self._settings, override)
        check_integer("num_steps", state["num_steps"])
        check_integer("num_postponed", state["num_postponed"], 0, MOST_POSTPONED_STEPS - 1)
        check_names("owed", state["owed"], self.sites.keys(), is_whole=True)
        for name, blocks in state["owed"].items():
            check_number(f"owed[{name!r}]", blocks, 0, 1)
        num_steps = state["num_steps"]
        counts = check_history(state["history"], num_steps, self.sites)
        new_steps = state.get("new_steps", _NO_NEW_STEPS)
        self._new_steps.check_state_dict(new_steps, self.model, num_steps)
        growth = self._stages.growth_after(num_steps, new_steps["num_last"])
        self._collection.check_state_dict(state["collected"], growth)
        if "density_schedule" not in check_override(override):
            first = {name: each[0] for name, each in counts.items()}
            self._stages.check_state(first, num_steps, step_of_last_load(state["history"]))
        self._trace.check_state_dict(state["trace"], num_steps, counts)

    def parts_of_state(self) -> list[dict[str, Any]]:
        """Returns the dicts that hold what ``load_state_dict`` changes, for whoever has to put it back."""
        parts = self._trace, self._trained, self._stages, self._new_steps
        return [self.__dict__, *(part.__dict__ for part in parts), *self._collection.parts_of_state()]
