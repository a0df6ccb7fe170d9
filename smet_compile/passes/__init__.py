"""Changes compiled graphs so that no dense weights and gradients are made. Here is the switch to turn that off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["disabled", "is_enabled"]
VARIABLE = "SMET_COMPILE_PASSES"
_disabled = 0


def is_enabled() -> bool:
    """Tells whether graphs that are compiled now go through the passes."""
    return _disabled == 0 and os.environ.get(VARIABLE, "1") != "0"


@contextmanager
def disabled() -> Iterator[None]:
    """Turns the passes off for what is compiled within: the same results, but dense weights and gradients in memory.

    ``SMET_COMPILE_PASSES=0`` in the environment does the same for a whole process.
    """
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1
