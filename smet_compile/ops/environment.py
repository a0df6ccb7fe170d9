"""Reads environment variables fast enough for every op: ``os.environ`` decodes a value at each look."""

from __future__ import annotations

import os
from typing import Any

_HAS_DATA = hasattr(os.environ, "_data")
_data: Any = getattr(os.environ, "_data", os.environ)


class Variable:
    """Names an environment variable, which may change while the process runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._key: Any = os.environ.encodekey(name) if _HAS_DATA else name

    def raw(self) -> object:
        """Returns the value in a form that is only to be compared; None where it is not set."""
        return _data.get(self._key)

    def text(self) -> str | None:
        """Returns the value; None where it is not set or empty."""
        return os.environ.get(self.name) or None
