"""update_all: one optimizer step of many parameters."""

from __future__ import annotations

from typing import Any

import torch


def update_all(updates: list[tuple[Any, ...]]) -> None:
    """Runs ``active_adamw_`` on each parameter. ``updates`` holds the arguments of each, its values first."""
    for update in updates:
        torch.ops.smet.active_adamw_(*update)
