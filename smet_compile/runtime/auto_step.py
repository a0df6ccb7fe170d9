"""Decides when a topology manager steps by itself, and which of two managers of a weight does."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from smet_compile.format.user_warning import warn_user
from smet_compile.ops import find_sites
from smet_compile.ops.optimizers import FoundOptimizer, unwrapped

_MOST_WAITING = 10
"""Steps of one optimizer for which a manager waits for one that makes none."""

_by_weight: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def steps_by_itself(auto_step: bool | None, found: Iterable[FoundOptimizer], weights: set[int]) -> bool:
    """Returns whether a manager steps by itself at the end of each optimizer step.

    A wrapper with groups or state of its own (Lookahead, SAM, ZeRO) acts after the step of the optimizer inside it, and
    would find another topology than before that step.

    Args:
        auto_step: the user's choice; None where the manager decides.
        found: the optimizers, wrappers among them.
        weights: ids of the compact weights' values.

    Raises:
        ValueError: the user asks for it where there is such a wrapper.
    """
    if auto_step is False:
        return False
    outer = next((each for each in found if each.holds & weights - each.steps and _acts_itself(each)), None)
    if outer is not None and auto_step:
        raise ValueError(
            f"auto_step: expected False for {outer.name}, which wraps the optimizer that steps and acts after it, got "
            "True; leave it out and call manager.step() after each step of the wrapper"
        )
    return outer is None


def _acts_itself(found: FoundOptimizer) -> bool:
    return unwrapped(found.optimizer) is found.optimizer


def all_stepped(found: Iterable[FoundOptimizer], weights: set[int], num_steps_of: Counter[int]) -> bool:
    """Returns whether every optimizer that steps a compact weight did, or one waited long enough for the others.

    ``num_steps_of`` are steps since the manager's last one, by the id of the optimizer.
    """
    nums = [num_steps_of[id(each.optimizer)] for each in found if each.steps & weights]
    return not nums or min(nums) > 0 or max(nums) >= _MOST_WAITING


def manager_that_steps(model: nn.Module) -> Any:
    """Returns the manager of the model's weights that steps by itself; None where there is none.

    Raises ValueError where there are several, since a checkpoint holds one.
    """
    managers: dict[int, tuple[str, Any]] = {}
    for name, site in find_sites(model).items():
        manager = _by_weight.get(id(site.values_maybe))
        if manager is not None and manager.auto_step:
            managers.setdefault(id(manager), (name, manager))
    found = list(managers.values())
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ValueError(
            f"manager: expected one for the whole model, since a checkpoint holds one, got {len(found)} ({names} have "
            "different ones); make one manager with all optimizers in a list, or a checkpoint of each part of the model"
        )
    return found[0][1] if found else None


def take_over(manager: Any, weights: Iterable[int]) -> None:
    """Has other managers of these weights no longer step by themselves; warns where they have the same optimizer."""
    for weight in weights:
        other = _by_weight.get(weight)
        if other is not None and other is not manager and other.auto_step:
            if any(own is each for own in manager.optimizers for each in other.optimizers):
                warn_user(
                    "TopologyManager: the optimizer has another manager, made before, which no longer steps by itself; "
                    "make one manager for a run"
                )
            other.retire()
        _by_weight[weight] = manager
