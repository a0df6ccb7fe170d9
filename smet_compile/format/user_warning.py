"""Gives warnings that name the user's line, however many frames of this package and of torch lie between."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_FOLDERS = Path(__file__).parent.parent, Path(str(torch.__file__)).parent
_INSIDE = (*(f"{folder}/" for folder in _FOLDERS), str(contextlib.__file__))
"""How the paths of code of this package and of torch begin, and of what runs functions that a context decorates."""


def warn_user(message: str) -> None:
    """Gives a ``UserWarning`` at the innermost line outside of this package and of torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
