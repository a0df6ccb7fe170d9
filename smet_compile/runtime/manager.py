"""TopologyManager: decides after each training step whether the topology changes now, and has it changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from smet_compile.format import arguments
from smet_compile.format.densities import DensitySchedule, Stage
from smet_compile.ops import Site, find_sites, following
from smet_compile.ops.optimizers import find_optimizers
from smet_compile.ops.sites import check_sparsified
from smet_compile.ops.torch_insides import after_backward, outside_graphs
from smet_compile.runtime.advice import (
    IdleCalls,
    check_ablation,
    check_feasible,
    warn_of_left_out,
    warn_of_newcomers,
    warn_of_no_call,
    warn_of_stillness,
    warn_of_tiles,
)
from smet_compile.runtime.auto_step import all_stepped, steps_by_itself, take_over
from smet_compile.runtime.collecting import GradientCollection
from smet_compile.runtime.history import TopologyEvent, Trace
from smet_compile.runtime.in_optimizer import InOptimizer, check_carried
from smet_compile.runtime.interrupts import waiting_interrupts
from smet_compile.runtime.managed_optimizers import ManagedOptimizers
from smet_compile.runtime.manager_state import MOST_POSTPONED_STEPS, SavedManager
from smet_compile.runtime.new_steps import NewSteps
from smet_compile.runtime.optimizer_steps import StepListener, TrainedParameters
from smet_compile.runtime.policies import DropName, GrowName, Policy
from smet_compile.runtime.resizing import choose_resize
from smet_compile.runtime.schedules import (
    DEFAULT_SCHEDULE,
    Schedule,
    ScheduleName,
    find_min_age,
    find_moving,
    make_schedule,
    name_of_schedule,
)
from smet_compile.runtime.settings import check_override
from smet_compile.runtime.shown_manager import ShownManager
from smet_compile.runtime.stages import DensityStages, check_one_process, take_stages
from smet_compile.runtime.update import Move, Rules, check_moves, check_start, choose_move, find_ranks, make_and_record
from smet_compile.shards import reshard

_ROUNDING = 1e-9
"""A sum of shares may miss a whole number by this share of a block."""


class TopologyManager(SavedManager, ShownManager):
    """Drops a share ζ of the blocks of each compact weight every ``every`` steps, and grows as many elsewhere.

    By default those of least mean \\|w\\| go, and others come at random. No block goes before the age of ``min_age``.
    Parts of a block are carried over to the next update. Tiles stay where they are unless a ``schedule`` is given.

    It steps by itself after each step of the optimizer, and its state is saved with the optimizer's. To step it at
    another moment, take ``auto_step=False`` and call ``step()`` once per training step::

        loss.backward(); optimizer.step(); optimizer.zero_grad(); manager.step()

    A step counts when the optimizer really stepped (a GradScaler skips some, accumulation too). An update whose
    step had a gradient that is not finite waits for the next step without; after ten it is left out, with a
    warning. Under ``torch.distributed`` every rank must hold the same model and call ``step()`` alike (data
    parallelism): then all ranks change to one topology, by the mean of their gradients where a policy asks for it.

    The optimizer may be wrapped (Accelerate's, Lookahead, SAM, ZeroRedundancyOptimizer): the steps of the innermost
    optimizers count, and the state that any of them keeps for a weight follows the topology. Several optimizers may
    share a manager: since the last call of ``step()``, there were as many steps as the one with most of them made.

    Args:
        model: has compact weights.
        optimizer: holds them. Any elementwise ``torch.optim`` optimizer, or several in a list, tuple or dict. For
            compact weights that an ``ActiveAdamW`` does not hold, others made with the same model are taken too.
        total_steps: length of the run, in optimizer steps.
        every: steps between updates (ΔT).
        drop_fraction: ζ at the start of the updates.
        final_drop_fraction: ζ at their end.
        stop_fraction: share of the run after which there is no update.
        drop: which blocks go, those of smallest "magnitude" (mean \\|w\\|), "relative_magnitude" (over the age of young
            blocks), "saliency" (mean \\|w · gradient\\|), "momentum", or "random"; or a policy, a function
            ``(site, context) → scores`` (see ``TopologyContext``).
        grow: which come: "random" (SET), those of largest "gradient" (RigL) or gradient "momentum", or a policy.
        schedule: how ζ falls: "cosine", "linear", "constant" (``drop_fraction`` throughout), "none" (static), or a
            function step → ζ. By default "cosine", and tiles stay where they are, with a warning: those that moved
            trained worse (docs/choosing.md).
        min_age: age in optimizer steps before which no grown block is dropped; by default 2 ΔT, or ΔT where ζ > 1/3.
        window: steps before an update over which gradients are added up, for policies that ask for them; by default
            what the policy says: 1 for "gradient" and "saliency", 10 for "momentum" growth.
        ablation_threshold: for the pattern "fan_in", rows of blocks of which fewer than this share are salient (not
            dropped, or best to grow) go as a whole, and the others share their blocks (SRigL, arXiv 2305.02299).
        seed: seed of everything random.
        density_schedule: stages as (step, density) pairs in order, or ``cubic_density(...)``: after the optimizer step
            ``step`` the model takes the density. Downwards the blocks of smallest ``drop`` score go, upwards ``grow``
            says which come; survivors keep values and state bit for bit, the memory of the others is freed. A stage
            takes the place of an update that is due with it, and does not wait: a weight whose gradient is not finite,
            or did not come, goes by "magnitude" and "random".
        auto_step: steps by itself, at the end of each training step of the optimizer, or of the last of several that
            hold compact weights; saves and loads its state with the optimizer's. Calls of ``step()`` then change
            nothing, and return what happened since the last one. By default it does, unless the optimizer is wrapped by
            one that acts after it (Lookahead, SAM, ZeRO).
        override: names of settings (``"total_steps"``, ``"every"``, ...) in which a saved run may differ that is loaded
            with the optimizer's state; it then goes on with this manager's.

    Raises:
        ValueError: a model without compact weights; an optimizer that does not hold them, or keeps a state that
            is neither shaped like the values nor a scalar, or of which it cannot be asked what a new weight starts
            with; a drop fraction for which there are too few inactive blocks (the largest possible is named); a
            ``min_age`` that leaves too few to drop; an argument out of range; a ``density_schedule`` out of order,
            beyond the run, that changes nothing, or under data parallelism or an "N:M" pattern. In ``step()``: a
            compact weight that was replaced after the optimizer was made; a policy that returns scores of another
            shape, or NaN. With ``auto_step``: an optimizer that carries a manager of other weights.
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
        drop: DropName | Policy = "magnitude",
        grow: GrowName | Policy = "random",
        schedule: ScheduleName | Callable[[int], float] | None = None,
        min_age: int | None = None,
        window: int | None = None,
        ablation_threshold: float | None = None,
        seed: int = 0,
        density_schedule: DensitySchedule | None = None,
        auto_step: bool | None = None,
        override: Iterable[str] = (),
    ) -> None:
        arguments.module("model", model)
        if not find_optimizers(optimizer, model.parameters()):
            arguments.optimizer("optimizer", optimizer)
        total_steps = arguments.whole_number("total_steps", total_steps, at_least=1)
        every = arguments.whole_number("every", every, at_least=1)
        stop_fraction = arguments.number("stop_fraction", stop_fraction, above=0, at_most=1)
        drop_fraction = arguments.number("drop_fraction", drop_fraction, at_least=0, below=1)
        final_drop_fraction = arguments.number("final_drop_fraction", final_drop_fraction, at_least=0, below=1)
        min_age = None if min_age is None else arguments.whole_number("min_age", min_age, at_least=0)
        window = None if window is None else arguments.whole_number("window", window, at_least=1)
        self._rules = Rules.of(drop, grow, every, arguments.seed_number("seed", seed), ablation_threshold)
        plain = Schedule(every, stop_fraction * total_steps, drop_fraction, final_drop_fraction)
        self.schedule = make_schedule(DEFAULT_SCHEDULE if schedule is None else schedule, plain)
        check_sparsified("TopologyManager", model)
        self.sites = find_sites(model)
        self._stages = DensityStages(density_schedule, model, total_steps)
        self._moving = find_moving(self.sites, schedule)
        if not self._moving:
            self.schedule = make_schedule("none", plain)
        elif not self._stages:
            check_feasible(self._moving, self.schedule.largest_fraction)
        self.min_age = find_min_age(min_age, self.schedule)
        check_ablation(ablation_threshold, self.sites)
        self._settings = self._rules.settings | {
            "total_steps": total_steps,
            "drop_fraction": drop_fraction,
            "final_drop_fraction": final_drop_fraction,
            "stop_fraction": stop_fraction,
            "schedule": name_of_schedule(schedule, len(self._moving), len(self.sites)),
            "min_age": min_age,
            "window": window,
            "density_schedule": self._stages.setting,
        }
        self.model = model
        self.optimizer = optimizer
        self._optimizers = ManagedOptimizers(optimizer, model, self.sites)
        self._listeners: dict[int, StepListener] = {}
        auto_step = None if auto_step is None else arguments.flag("auto_step", auto_step)
        self.auto_step = steps_by_itself(auto_step, self._optimizers.found, self._weights)
        self._override = check_override(override)
        self._last_event: TopologyEvent | None = None
        self._steps_itself = self._made_steps = False
        self.num_steps = 0
        self.history: list[TopologyEvent] = []
        self._new_steps = NewSteps()
        self._idle_calls = IdleCalls(model)
        self._num_postponed = 0
        self._trained = TrainedParameters()
        changing = self.sites if self._stages else self._moving
        self._collection = GradientCollection(model, changing, self._rules, window, self.schedule.largest_fraction)
        self._owed, self._awaited = dict.fromkeys(self.sites, 0.0), {}
        self._was_called = self._warned_of_newcomers = False
        self._trace = Trace(self.sites, self.min_age)
        self._in_optimizer: InOptimizer | None = None
        self._listen()
        if schedule is None:
            warn_of_tiles(len(self.sites) - len(self._moving), len(self.sites))
        warn_of_stillness(self._moving, self.schedule, total_steps)

    @property
    def _weights(self) -> set[int]:
        return {id(site.values) for site in self.sites.values()}  # found anew: a copy has other weights

    @property
    def optimizers(self) -> list[Any]:
        """Returns the optimizers that were found in the given ones, wrappers before what they wrap."""
        return [found.optimizer for found in self._optimizers.found]

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the settings by the names of their arguments; policies and schedules by their names."""
        return dict(self._settings)

    @property
    def next_update(self) -> int | None:
        """Returns the optimizer step after which the topology changes next; None where it never will again."""
        upcoming = self._next_scheduled, self._stages.next_after(self.num_steps)
        return min((step for step in upcoming if step is not None), default=None)

    @property
    def _next_scheduled(self) -> int | None:
        soon, later = self.num_steps + 1, self.schedule.next_after(self.num_steps)
        return soon if self._num_postponed and soon < self.schedule.stop_step else later

    def _is_due(self, step: int) -> bool:
        return self.next_update is not None and self.next_update <= step

    def _listen(self) -> None:
        """Listens to optimizers, which keep it alive with ``auto_step``, and collects gradients for the next update."""
        if self.auto_step:
            check_carried(self, self._weights, self._optimizers.stepping[0].optimizer, self._override)
            take_over(self, self._weights)  # from here on nothing is refused
        take_stages(self.model, bool(self._stages))
        following.keep(self)
        self._listen_to_optimizers()
        self._prepare_next_step()
        if self.auto_step:
            self._in_optimizer = InOptimizer(self, self._optimizers.stepping[0].optimizer, self._override)

    def retire(self) -> None:
        """Makes it step, save and load no longer by itself."""
        self.auto_step, self._was_called = False, True
        for listener in self._listeners.values():
            listener.stop()
        if self._in_optimizer is not None:
            self._in_optimizer.stop()

    def _listen_to_optimizers(self) -> None:
        following.watch(*self.optimizers)
        for found in self._optimizers.stepping:
            if id(found.optimizer) not in self._listeners:
                self._listeners[id(found.optimizer)] = StepListener(found, self._after_optimizer_step, self.auto_step)
        self._trained.set_optimizers(self.optimizers)

    def _after_optimizer_step(self, optimizer: Any) -> None:
        """Counts the step and looks at its gradients, which a closure makes in it and ``zero_grad`` soon takes away."""
        is_alone = len(self._optimizers.stepping) == 1
        is_looked_at = self._is_due(self._new_steps.add(optimizer, self.num_steps, is_alone))
        (self._trained.look_at_step if is_looked_at else self._trained.note_step)(optimizer)
        self._collection.end_step(optimizer)
        self._read_counts()
        if self.auto_step:
            if all_stepped(self._optimizers.stepping, self._weights, self._new_steps.of):
                after_backward(self._step_by_itself)
        elif not self._was_called and self.next_update is not None:
            warn_of_no_call(self._new_steps.num, self.schedule.every)

    def _step_by_itself(self) -> None:
        self._steps_itself = True
        try:
            self._last_event = self.step() or self._last_event
        finally:
            self._steps_itself = False

    @outside_graphs("TopologyManager.step runs in eager mode; call it outside of functions with fullgraph=True")
    @torch.no_grad()
    @waiting_interrupts()
    def step(self) -> TopologyEvent | None:
        """Changes the topology if this step is one to do so; returns what happened, or None.

        With ``auto_step`` it returns the last thing that happened since the last call.
        """
        if self.auto_step and not self._steps_itself:
            if not self._made_steps:
                self._idle_calls.add(found.name for found in self._optimizers.stepping)
            event, self._last_event, self._made_steps = self._last_event, None, False
            return event
        self._was_called = self._made_steps = True
        reshard(self.model)
        self._optimizers.check_weights()
        if not self._new_steps.num:
            self._idle_calls.add(found.name for found in self._optimizers.stepping)
            return None
        self._idle_calls.count = 0
        self._collection.begin_update(o for o in self._optimizers.stepping if self._new_steps.of[id(o.optimizer)])
        step = self.num_steps + self._new_steps.num
        due = self._is_due(step)
        if due or self.num_steps == 0:
            self._optimizers.find()
            self._listen_to_optimizers()
        stage = self._stages.find_due(step)
        with self._collection.given_up_after_error():
            event = self._enter(stage, step) if stage else self._update(step) if due else None
        self.num_steps = step
        self._new_steps.begin_anew()
        self._num_postponed = self._num_postponed + 1 if due and event is None else 0
        if self._num_postponed == MOST_POSTPONED_STEPS:
            self._give_up()
        if event is not None:
            self._trained.forget()
        self._collect_gradients(afresh=event is not None)
        if event is not None and stage is None and not self._warned_of_newcomers:
            self._warned_of_newcomers = warn_of_newcomers(event, self.min_age)
        return event

    def _prepare_next_step(self) -> None:
        """Prepares for the next step, where an update is due after it."""
        self._collect_gradients(afresh=True)
        self._read_counts()

    def _read_counts(self) -> None:
        """Reads the counts of updates made in backward, where the next step of an optimizer may be looked at."""
        if self._is_due(self._new_steps.next_looked_at(self.num_steps)):
            self._trained.read_counts()

    def _give_up(self) -> None:
        """Leaves out an update that was postponed too often, with a warning."""
        self._num_postponed = 0
        warn_of_left_out(MOST_POSTPONED_STEPS, self.model, self._trained.not_finite, self.next_update)
        self._trained.forget()

    def _collect_gradients(self, afresh: bool) -> None:
        self._collection.advance(self._is_near(), afresh)

    def _update(self, step: int) -> TopologyEvent | None:
        """Changes every weight that moves and was trained since the last update; None where there is none.

        All moves are chosen before the first is made: an error of a policy takes nothing but this step's gradients.
        """
        device = next(iter(self._moving.values())).values.device
        ranks, alike = find_ranks(self.model, self.sites)
        rules = dataclasses.replace(self._rules, ranks=ranks, alike=alike)
        if not self.history:
            check_start(self._settings, self.sites, ranks, alike)
        is_ready = ranks.least([int(self._is_ready(site)) for site in self._moving.values()], device)
        ready = [site for site, go in zip(self._moving.values(), is_ready, strict=True) if go]
        if not ready:
            return None
        fraction = self.schedule.drop_fraction(step)
        owed = {s.name: self._owed[s.name] + fraction * s.num_active / s.layout.num_slabs for s in ready}  # of a slab
        counts = {name: math.floor(blocks + _ROUNDING) for name, blocks in owed.items()}
        moves = [self._choose(choose_move, site, rules, step, counts[site.name]) for site in ready]
        check_moves(moves, ranks, alike)
        self._owed.update((name, max(0.0, blocks - counts[name])) for name, blocks in owed.items())
        made = {move.site.name: make_and_record(move, step, self._optimizers, self._trace) for move in moves}
        event = TopologyEvent(step, fraction, made)
        self.history.append(event)
        return event

    def _enter(self, stage: Stage, step: int) -> TopologyEvent:
        """Gives every weight the number of blocks that it has in a stage."""
        check_one_process(self.model)
        counts, plain = self._stages.counts_of(stage), self._rules.for_untrained
        changing = [site for name, site in self.sites.items() if site.num_active != counts[name]]
        moves = [
            self._choose(choose_resize, site, self._rules if self._is_ready(site) else plain, step, counts[site.name])
            for site in changing
        ]
        event = TopologyEvent(step, 0.0, {}, stage.density)
        self.history.append(event)  # what an interrupt leaves out is made at the next step, as an event of its own
        for move in moves:
            event.sites[move.site.name] = make_and_record(move, step, self._optimizers, self._trace)
        self._stages.enter(stage)
        return event

    def _choose(self, choose: Callable[..., Move], site: Site, rules: Rules, step: int, count: int) -> Move:
        return choose(site, rules, step, count, self._trace.protected(site.name, step), self._optimizers)

    def _is_ready(self, site: Site) -> bool:
        is_left_out = self._optimizers.is_gone(site) or self._trained.not_finite or site.values not in self._trained
        return not is_left_out and self._collection.has_gradient(site)

    def __getstate__(self) -> dict[str, Any]:
        new_steps = self._new_steps.state_dict(self.model, self._optimizers.stepping, self._trained)
        return self.__dict__ | {"_listeners": {}, "_new_steps_of_original": new_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied optimizer has lost its hooks, a copied weight its listener.
        self.__dict__.update(state)
        self._optimizers.find()
        new_steps = self.__dict__.pop("_new_steps_of_original")
        self._new_steps.load_state_dict(new_steps, self.model, self._optimizers.stepping, self._trained)
        self._listen()
        self._collection.fill_as_original()
