"""Lets the manager's state travel in the state dict of an optimizer, so that whoever saves the one saves the other."""

from __future__ import annotations

import warnings
from typing import Any

from smet_compile.runtime.manager_state import SavedManager

KEY = "topology_manager"


class InOptimizer:
    """Adds the manager's state to what an optimizer saves, and takes it out of what it loads."""

    def __init__(self, manager: SavedManager, optimizer: Any) -> None:
        self._manager = manager
        self._loaded: dict[str, Any] | None = None
        optimizer.register_state_dict_post_hook(self._add)
        optimizer.register_load_state_dict_pre_hook(self._take)
        optimizer.register_load_state_dict_post_hook(self._give)

    def _add(self, _: Any, state: dict[str, Any]) -> None:
        state[KEY] = self._manager.state_dict()

    def _take(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        self._loaded = state.get(KEY)
        if self._loaded is None:
            warnings.warn(
                "TopologyManager: expected its state in that of the optimizer, got none, so its history and its steps "
                "begin anew; the file was saved without save_with_optimizer: load the manager's state by itself",
                stacklevel=2,
            )
        else:
            self._manager.check_state_dict(self._loaded)
        return {key: value for key, value in state.items() if key != KEY}

    def _give(self, _: Any) -> None:
        if self._loaded is not None:
            self._manager.load_state_dict(self._loaded)
            self._loaded = None
