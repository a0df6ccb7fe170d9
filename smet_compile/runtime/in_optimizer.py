"""Lets the manager's state travel in the state dict of an optimizer, so that whoever saves the one saves the other.

It is one value, bytes, in the first parameter group, from the first step on: ``torch.distributed.checkpoint`` keeps the
groups of an optimizer but no other keys, and takes trees apart by the structure that a fresh run has.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from smet_compile.format.user_warning import warn_user
from smet_compile.ops.loaded import MANAGER, kind_of
from smet_compile.runtime import checkpoint_file
from smet_compile.runtime.manager_state import SavedManager

_by_optimizer: weakref.WeakValueDictionary[int, InOptimizer] = weakref.WeakValueDictionary()
_leaves_out: ContextVar[bool] = ContextVar("leaves_out", default=False)


@contextmanager
def managers_left_out() -> Iterator[None]:
    """Saves and loads optimizers without the managers in them, for who saves managers by themselves."""
    token = _leaves_out.set(True)
    try:
        yield
    finally:
        _leaves_out.reset(token)


def check_carried(manager: SavedManager, weights: set[int], optimizer: Any, override: Iterable[str]) -> None:
    """Raises ValueError where ``optimizer`` cannot carry the state of ``manager``, whose values have these ids.

    It carries that of other weights, which would be overwritten, or was loaded with one that the manager cannot go on
    with.
    """
    other = _by_optimizer.get(id(optimizer))
    theirs = {} if other is None or other.manager is None else other.manager.sites
    others = {name: id(site.values_maybe) for name, site in theirs.items() if site.values_maybe is not None}
    if others and weights.isdisjoint(others.values()):
        raise ValueError(
            f"{next(iter(manager.sites))}: expected an optimizer without another manager, got one "
            f"({type(optimizer).__name__}) that carries the state of a manager of other weights "
            f"({next(iter(others))}, ...), and can carry one; "
            "make one manager for the whole model, an optimizer for each part, or pass auto_step=False and save "
            "manager.state_dict() by itself"
        )
    packed = optimizer.param_groups[0].get(MANAGER)
    if packed is not None:
        manager.check_state_dict(_unpacked(packed), override=override)


class InOptimizer:
    """Adds the manager's state to what an optimizer saves, and takes it out of what it loads."""

    def __init__(self, manager: SavedManager, optimizer: Any, override: Iterable[str]) -> None:
        self.manager: SavedManager | None = manager
        self._override = override
        self._loaded: dict[str, Any] | None = None
        optimizer.register_state_dict_post_hook(self._add)
        optimizer.register_load_state_dict_pre_hook(self._take)
        optimizer.register_load_state_dict_post_hook(self._give)
        _by_optimizer[id(optimizer)] = self
        packed = optimizer.param_groups[0].pop(MANAGER, None)
        if packed is not None:  # the optimizer was loaded before it had a manager
            manager.load_state_dict(_unpacked(packed), override=override)

    def stop(self) -> None:
        """Adds and takes nothing from now on."""
        self.manager = None

    def _add(self, _: Any, state: dict[str, Any]) -> None:
        if self.manager is not None and not _leaves_out.get():
            state["param_groups"][0][MANAGER] = checkpoint_file.to_bytes(self.manager.state_dict())

    def _take(self, _: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        self._loaded = None
        if self.manager is None or _leaves_out.get() or "param_groups" not in state:
            return None
        packed = [group[MANAGER] for group in state["param_groups"] if MANAGER in group]
        own = checkpoint_file.to_bytes(self.manager.state_dict())
        if packed and packed[0] != own:  # Accelerate loads an optimizer's own state into it
            self._loaded = _unpacked(packed[0])
            self.manager.check_state_dict(self._loaded, override=self._override)
        elif not packed:
            warn_user(
                "TopologyManager: expected its state in that of the optimizer, got none, so its steps and history are "
                "those that it had; load manager.state_dict() by itself where it was saved by itself, as older "
                "versions did and as flattened state dicts of torch.distributed.checkpoint need it"
            )
        groups = [{key: value for key, value in group.items() if key != MANAGER} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def _give(self, _: Any) -> None:
        if self.manager is not None and self._loaded is not None:
            self.manager.load_state_dict(self._loaded, override=self._override)
        self._loaded = None


def _unpacked(packed: Any) -> dict[str, Any]:
    if not isinstance(packed, bytes):
        raise ValueError(f"{MANAGER}: expected the bytes that a manager saves in its optimizer, got {kind_of(packed)}")
    return checkpoint_file.from_bytes(MANAGER, packed)
