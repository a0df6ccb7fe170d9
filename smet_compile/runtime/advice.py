"""Checks whether a manager's updates are possible, and warns where they do nothing or nobody asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from smet_compile.format.patterns import FAN_IN
from smet_compile.format.user_warning import warn_user
from smet_compile.ops import Site, canonical_name
from smet_compile.runtime.history import TopologyEvent
from smet_compile.runtime.schedules import Schedule

_NUM_NAMED = 3
_FEWEST_TO_JUDGE = 16
"""Number of dropped blocks from which the share of newcomers among them may bring a warning."""
_HARDLY_MOVES = 0.9
"""Share of newcomers in what is dropped from which they bring one. Single weights under defaults have 0.4 to 0.8."""
_IDLE_CALLS, _IDLE_CALLS_OF_ACCUMULATION = 10, 100
"""Numbers of calls in a row without a step of the optimizer that bring a warning."""


def check_feasible(sites: dict[str, Site], drop_fraction: float) -> None:
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


def check_ablation(threshold: float | None, sites: dict[str, Site]) -> None:
    """Raises ValueError for a threshold without a weight of the pattern "fan_in"."""
    if threshold is not None and sites and not any(site.compact.pattern == FAN_IN for site in sites.values()):
        raise ValueError(
            'ablation_threshold: expected a weight with the pattern "fan_in", got none; sparsify with pattern="fan_in"'
        )


def warn_of_stillness(sites: dict[str, Site], schedule: Schedule, total_steps: int) -> None:
    """Warns where no update fits into the run, or where weights that move are too small to do so in every update."""
    if not sites:
        return
    if schedule.num_updates == 0:
        warn_user(
            f"TopologyManager: no topology update fits: the first would be due after step {schedule.every}, and none "
            f"is made from step {schedule.stop_step:g} of {total_steps} on; lower every, raise total_steps, or say "
            'schedule="none"',
        )
        return
    first = schedule.drop_fraction(schedule.every)
    slow = [
        f"{name} ({site.num_active:,} active blocks)" for name, site in sites.items() if first * site.num_active < 1
    ]
    if slow and first > 0:
        more = f" and {len(slow) - _NUM_NAMED} more" if len(slow) > _NUM_NAMED else ""
        warn_user(
            f"TopologyManager: {', '.join(slow[:_NUM_NAMED])}{more}: a drop fraction of {first:.3g} is less than one "
            "block an update, so these weights move only now and then; take smaller blocks, a larger drop_fraction, "
            'or schedule="none"',
        )


def warn_of_tiles(num_tiles: int, num_weights: int) -> None:
    """Warns that the topology of tiles, where there are any, does not change where nobody asked for a schedule."""
    if num_tiles:
        warn_user(
            f"TopologyManager: {num_tiles} of {num_weights} compact weights consist of tiles, which stay where they "
            'are: those that moved trained worse (docs/choosing.md); say schedule="cosine" to move them, or '
            'schedule="none" to keep everything in place',
        )


def warn_of_newcomers(event: TopologyEvent, min_age: int) -> bool:
    """Warns where nearly all that was dropped had just been grown, so that the topology hardly moves; tells whether so.

    ``min_age`` is the number of steps for which newcomers were protected.
    """
    total = event.total
    if total.num_dropped < _FEWEST_TO_JUDGE or total.num_newcomers_dropped < _HARDLY_MOVES * total.num_dropped:
        return False
    warn_user(
        f"TopologyManager: of {total.num_dropped:,} blocks dropped after step {event.step}, "
        f"{total.num_newcomers_dropped:,} were newcomers, dropped as soon as they could be: what grows does "
        f'not stay; raise min_age (now {min_age} steps), lower drop_fraction, or say schedule="none", as suits tiles'
    )
    return True


def warn_of_no_call(num_steps: int, every: int) -> None:
    """Warns once, after 1.5 ΔT steps of the optimizer, that ``manager.step()`` was never called."""
    if num_steps == math.ceil(1.5 * every):
        warn_user(
            f"TopologyManager: the optimizer made {num_steps} steps and manager.step() was never called, so the "
            "topology does not change; call it after each optimizer.step()",
        )


class IdleCalls:
    """Counts the calls of ``manager.step()`` in a row that saw no step of an optimizer.

    It warns soon, or later where gradients of ``model`` are being accumulated.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.count = 0

    def add(self, optimizers: Iterable[str]) -> None:
        """Counts one more call; ``optimizers`` are the names of those whose steps would be seen."""
        self.count += 1
        is_accumulating = any(parameter.grad is not None for parameter in self._model.parameters())
        if self.count == (_IDLE_CALLS_OF_ACCUMULATION if is_accumulating else _IDLE_CALLS):
            warn_user(
                f"TopologyManager: step() was called {self.count} times and no step of the optimizer "
                f"({', '.join(sorted(set(optimizers)))}) was seen, so the topology does not change; pass the optimizer "
                "whose step() trains the model, and call manager.step() after it. A GradScaler that skips every step "
                "looks the same"
            )


def warn_of_left_out(
    num_steps: int, model: nn.Module, not_finite: Iterable[nn.Parameter], next_update: int | None
) -> None:
    """Warns that an update was left out after so many steps.

    ``not_finite`` are the parameters of ``model`` whose gradients were the cause, if any.
    """
    bad = {id(parameter) for parameter in not_finite}
    names = [canonical_name(model, name) for name, parameter in model.named_parameters() if id(parameter) in bad]
    reason = f"the gradient of {', '.join(names[:_NUM_NAMED])} is not finite" if bad else "no gradient came"
    warn_user(
        f"TopologyManager: an update was postponed for {num_steps} steps since {reason}; it is left out, the next is "
        f"due after step {next_update}"
    )
