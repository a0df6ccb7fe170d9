"""Turns the passes off and on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "SMET_COMPILE_PASSES"
_disabled = 0


def is_enabled() -> bool:
    return _disabled == 0 and os.environ.get(VARIABLE, "1") != "0"


@contextmanager
def disabled() -> Iterator[None]:
    """What is compiled within goes without the passes: the same results, dense weights and gradients in memory.

    ``SMET_COMPILE_PASSES=0`` in the environment does the same for a whole process.
    """
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1
