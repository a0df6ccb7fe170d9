"""TopologyManager: decides after each training step whether the topology changes now, and has it changed."""

from __future__ import annotations

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from smet_compile.format import arguments
from smet_compile.format.arguments import number, one_of, seed_number, whole_number
from smet_compile.ops import Site, canonical_name, find_sites
from smet_compile.ops.loaded import check_integer, check_keys
from smet_compile.ops.optimizers import find_optimizers
from smet_compile.ops.sites import check_sparsified
from smet_compile.ops.torch_insides import outside_graphs
from smet_compile.runtime.managed_optimizers import ManagedOptimizers
from smet_compile.runtime.optimizer_steps import StepListener, TrainedParameters
from smet_compile.runtime.schedules import SCHEDULES, check_settings
from smet_compile.runtime.update import (
    GradientCandidates,
    SiteEvent,
    TopologyEvent,
    Trace,
    agree_on_positions,
    agree_on_ready,
    check_history,
    drop_smallest,
    grow_random,
    move,
)

_MAX_POSTPONED_STEPS = 10
_IDLE_CALLS, _IDLE_CALLS_OF_ACCUMULATION = 10, 100
"""Numbers of calls in a row without a step of the optimizer that bring a warning."""


class TopologyManager:
    """Drops the floor(ζ N) blocks of least mean \\|w\\| of each compact weight every ``every`` steps, grows as many.

    Call ``step()`` once per training step, after ``optimizer.step()``::

        loss.backward(); optimizer.step(); optimizer.zero_grad(); manager.step()

    A step counts when the optimizer really stepped (a GradScaler skips some, accumulation too). An update whose
    step had a gradient that is not finite waits for the next step without; after ten it is left out, with a
    warning. Under ``torch.distributed`` every rank must hold the same model and call ``step()`` alike (data
    parallelism): then all ranks change to one topology, gradient growth taking the candidates of rank 0.

    The optimizer may be wrapped (Accelerate's, Lookahead, SAM, ZeroRedundancyOptimizer): the steps of the innermost
    optimizers count, and the state that any of them keeps for a weight follows the topology. Several optimizers may
    share a manager: since the last call of ``step()``, there were as many steps as the one with most of them made.

    Args:
        model: has compact weights.
        optimizer: holds them. Any elementwise ``torch.optim`` optimizer, or several in a list, tuple or dict. For
            compact weights that an ``ActiveAdamW`` does not hold, others made with the same model are taken too.
        total_steps: length of the run, in optimizer steps.
        every: steps between updates (ΔT).
        drop_fraction, final_drop_fraction: ζ at the start and at the end of the updates.
        stop_fraction: share of the run after which there is no update.
        grow: "random" (SET) or "gradient" (RigL).
        schedule: how ζ falls: "cosine", "linear", "constant" (``drop_fraction`` throughout), or "none" (static).
        seed: seed of random growth.

    Raises:
        ValueError: a model without compact weights; an optimizer that does not hold them, or keeps a state that
            is neither shaped like the values nor a scalar, or of which it cannot be asked what a new weight starts
            with; a drop fraction for which there are too few inactive blocks (the largest possible is named); an
            argument out of range. In ``step()``: a compact weight that was replaced after the optimizer was made.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Any] | Mapping[Any, Any],
        *,
        total_steps: int,
        every: int = 100,
        drop_fraction: float = 0.2,
        final_drop_fraction: float = 0.005,
        stop_fraction: float = 0.75,
        grow: str = "random",
        schedule: str = "cosine",
        seed: int = 0,
    ) -> None:
        arguments.module("model", model)
        if not find_optimizers(optimizer, model.parameters()):
            arguments.optimizer("optimizer", optimizer)
        total_steps = whole_number("total_steps", total_steps, at_least=1)
        every = whole_number("every", every, at_least=1)
        stop_fraction = number("stop_fraction", stop_fraction, above=0, at_most=1)
        drop_fraction = number("drop_fraction", drop_fraction, at_least=0, below=1)
        final_drop_fraction = number("final_drop_fraction", final_drop_fraction, at_least=0, below=1)
        one_of("grow", grow, ("random", "gradient"))
        one_of("schedule", schedule, tuple(SCHEDULES))
        seed = seed_number("seed", seed)
        check_sparsified("TopologyManager", model)
        self.sites = find_sites(model)
        stop_step = stop_fraction * total_steps
        self.schedule = SCHEDULES[schedule if self.sites else "none"](
            every, stop_step, drop_fraction, final_drop_fraction
        )
        self._max_drop_fraction = max(drop_fraction, final_drop_fraction)
        if schedule != "none":
            _check_feasible(self.sites, self._max_drop_fraction)
        self._settings = {
            "total_steps": total_steps,
            "every": every,
            "drop_fraction": drop_fraction,
            "final_drop_fraction": final_drop_fraction,
            "stop_fraction": stop_fraction,
            "schedule": schedule,
        }
        self.model = model
        self.optimizer = optimizer
        self._optimizers = ManagedOptimizers(optimizer, model, self.sites)
        self._listeners: dict[int, StepListener] = {}
        self.grow = grow
        self.seed = seed
        self.num_steps = 0
        self.history: list[TopologyEvent] = []
        self._num_new_steps = 0
        self._new_steps_of: Counter[int] = Counter()
        self._num_idle_calls = 0
        self._num_postponed = 0
        self._trained = TrainedParameters()
        self._candidates: dict[str, GradientCandidates] = {}
        self._trace = Trace(self.sites)
        self._listen()

    @property
    def optimizers(self) -> list[Any]:
        """Returns the optimizers that were found in the given ones, wrappers before what they wrap."""
        return [found.optimizer for found in self._optimizers.found]

    @property
    def next_update(self) -> int | None:
        """Returns the optimizer step after which the topology changes next; None where it never will again."""
        if self._num_postponed and self.num_steps + 1 < self.schedule.stop_step:
            return self.num_steps + 1
        return self.schedule.next_after(self.num_steps)

    def _is_due(self, step: int) -> bool:
        return self.next_update is not None and self.next_update <= step

    def _listen(self) -> None:
        """Listens to optimizers, without being kept alive by them, and to gradients where an update is next."""
        self._listen_to_optimizers()
        weakref.finalize(self, _stop_listening, self._candidates).atexit = False
        self._prepare_next_step()

    def _listen_to_optimizers(self) -> None:
        for found in self._optimizers.stepping:
            if id(found.optimizer) not in self._listeners:
                self._listeners[id(found.optimizer)] = StepListener(found, self._after_optimizer_step)
        self._trained.set_optimizers(self.optimizers)

    def _after_optimizer_step(self, optimizer: Any) -> None:
        """Counts the step and looks at its gradients, which a closure makes in it and ``zero_grad`` soon takes away."""
        if not self._num_new_steps:
            self._new_steps_of.clear()
        self._new_steps_of[id(optimizer)] += 1
        num_new = self._new_steps_of[id(optimizer)]
        self._num_new_steps = max(self._num_new_steps, num_new)
        if self._is_due(self.num_steps + num_new):
            self._trained.look_at_step(optimizer)
        if self._is_due(self.num_steps + num_new + 1):
            self._trained.read_counts()

    @outside_graphs("TopologyManager.step runs in eager mode; call it outside of functions with fullgraph=True")
    @torch.no_grad()
    def step(self) -> TopologyEvent | None:
        """Changes the topology if this step is one to do so; returns what happened, or None."""
        self._optimizers.check_weights()
        if not self._num_new_steps:
            self._count_idle_call()
            return None
        self._num_idle_calls = 0
        due = self._is_due(self.num_steps + self._num_new_steps)
        if due or self.num_steps == 0:
            self._optimizers.find()
            self._listen_to_optimizers()
        self.num_steps += self._num_new_steps
        self._num_new_steps = 0
        event = self._update() if due else None
        self._num_postponed = self._num_postponed + 1 if due and event is None else 0
        if self._num_postponed == _MAX_POSTPONED_STEPS:
            self._give_up()
        self._trained.forget()
        self._watch_gradients()
        return event

    def _count_idle_call(self) -> None:
        """Warns once where no step of the optimizer is ever seen, later where gradients are being accumulated."""
        self._num_idle_calls += 1
        if self._num_idle_calls not in (_IDLE_CALLS, _IDLE_CALLS_OF_ACCUMULATION):
            return
        is_waiting = any(parameter.grad is not None for parameter in self.model.parameters())
        if self._num_idle_calls == (_IDLE_CALLS_OF_ACCUMULATION if is_waiting else _IDLE_CALLS):
            names = ", ".join(sorted({found.name for found in self._optimizers.stepping}))
            warnings.warn(
                f"TopologyManager: step() was called {self._num_idle_calls} times and no step of the optimizer "
                f"({names}) was seen, so the topology does not change; pass the optimizer whose step() trains the "
                "model, and call manager.step() after it. A GradScaler that skips every step looks the same",
                stacklevel=6,
            )

    def _prepare_next_step(self) -> None:
        """Prepares for the next step, where an update is due after it."""
        self._watch_gradients()
        if self._is_due(self.num_steps + 1):
            self._trained.read_counts()

    def _give_up(self) -> None:
        """Leaves out an update that was postponed too often, with a warning."""
        self._num_postponed = 0
        bad = {id(p) for p in self._trained.not_finite}
        names = [canonical_name(self.model, name) for name, p in self.model.named_parameters() if id(p) in bad]
        reason = f"the gradient of {', '.join(names[:3])} is not finite" if bad else "no gradient came"
        warnings.warn(
            f"TopologyManager: an update was postponed for {_MAX_POSTPONED_STEPS} steps since {reason}; it is left "
            f"out, the next is due after step {self.next_update}",
            stacklevel=6,
        )

    def _watch_gradients(self) -> None:
        """Listens to dense gradients in the step before an update, and in no other."""
        _stop_listening(self._candidates)
        if self.grow != "gradient" or not self._is_due(self.num_steps + 1):
            return
        for name, site in self.sites.items():
            self._candidates[name] = GradientCandidates(site, math.floor(self._max_drop_fraction * site.num_active))
            self._candidates[name].attach()

    def _update(self) -> TopologyEvent | None:
        """Changes every weight that was trained in this step; None where there was none."""
        device = next(iter(self.sites.values())).values.device
        ready = agree_on_ready([self._is_ready(site) for site in self.sites.values()], device)
        if not any(ready):
            return None
        events = {name: self._change(site) for (name, site), go in zip(self.sites.items(), ready, strict=True) if go}
        event = TopologyEvent(self.num_steps, self.schedule.drop_fraction(self.num_steps), events)
        self.history.append(event)
        return event

    def _is_ready(self, site: Site) -> bool:
        trained = not self._trained.not_finite and site.values in self._trained
        if trained and self.grow == "gradient":
            return site.name in self._candidates and self._candidates[site.name].take(1) is not None
        return trained

    def _change(self, site: Site) -> SiteEvent:
        before = site.mask()
        count = math.floor(self.schedule.drop_fraction(self.num_steps) * site.num_active)
        if self.grow == "gradient":
            grown = self._candidates[site.name].take(count)
            assert grown is not None
            dropped = drop_smallest(site, before, len(grown))
        else:
            dropped = drop_smallest(site, before, count)
            grown = grow_random(site, before, dropped, self.seed, self.num_steps)
        mean_age = self._optimizers.mean_age(site.values)
        after = move(site, before, agree_on_positions(dropped), agree_on_positions(grown), self._optimizers.state)
        return self._trace.record(site.name, before, after, mean_age)

    def state_dict(self) -> dict[str, Any]:
        """Returns settings, steps counted, history, and which blocks were ever active, as a resumed run needs them."""
        return {
            "settings": self._own_settings(),
            "num_steps": self.num_steps,
            "num_postponed": self._num_postponed,
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
        self._num_postponed = state["num_postponed"]
        self.history = [TopologyEvent.from_dict(event) for event in state["history"]]
        self._trace.load_state_dict(state["trace"])
        self._prepare_next_step()

    def check_state_dict(self, state: dict[str, Any], *, override: Iterable[str] = ()) -> None:
        """Raises ValueError where ``load_state_dict`` would."""
        check_keys("manager", state, ("num_steps", "num_postponed", "history", "trace"), ("settings",))
        check_settings(state.get("settings", {}), self._own_settings(), override)
        check_integer("num_steps", state["num_steps"])
        check_integer("num_postponed", state["num_postponed"], 0, _MAX_POSTPONED_STEPS - 1)
        check_history(state["history"], state["num_steps"], self.sites)
        self._trace.check_state_dict(state["trace"])

    def parts_of_state(self) -> list[dict[str, Any]]:
        """Returns the dicts that hold what ``load_state_dict`` changes, for whoever has to put it back."""
        return [self.__dict__, self._trace.__dict__, self._trained.__dict__, self._candidates]

    def _own_settings(self) -> dict[str, Any]:
        return self._settings | {"grow": self.grow, "seed": self.seed}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_listeners": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied optimizer has lost its hooks, a copied weight its listener.
        self.__dict__.update(state)
        self._optimizers.find()
        self._listen()


def _stop_listening(candidates: dict[str, GradientCandidates]) -> None:
    for each in candidates.values():
        each.detach()
    candidates.clear()


def _check_feasible(sites: dict[str, Site], drop_fraction: float) -> None:
    """Raises ValueError where fewer than floor(ζ N) blocks are inactive: dropped ones must not grow back at once."""
    for name, site in sites.items():
        inactive = site.layout.num_blocks - site.num_active
        if math.floor(drop_fraction * site.num_active) > inactive:
            largest = min(s.layout.num_blocks / s.num_active - 1 for s in sites.values())
            raise ValueError(
                f"{name}: a drop fraction of {drop_fraction} needs {math.floor(drop_fraction * site.num_active)} "
                f"inactive blocks, density {site.density:.3f} leaves {inactive}; the largest possible drop fraction "
                f"for this model is {math.floor(largest * 1000) / 1000}"
            )
