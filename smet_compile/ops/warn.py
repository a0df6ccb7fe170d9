"""Warns from inside an op without leaving a training step half made."""

from __future__ import annotations

import warnings

from smet_compile.ops.private import is_in_backward

_warned: set[str] = set()


def warn_once(message: str, key: str | None = None) -> None:
    """Gives a ``UserWarning`` once in a process for ``key``, the message itself by default.

    Call it before anything is computed or changed. Where warnings are errors it raises, except in a backward: there
    other weights may have been updated already, so the warning is shown instead.
    """
    if (key or message) in _warned:
        return
    _warned.add(key or message)
    try:
        warnings.warn(message, stacklevel=3)
    except UserWarning as error:
        if not is_in_backward():
            raise
        warnings.showwarning(error, UserWarning, __file__, 0)
