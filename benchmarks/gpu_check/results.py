"""Finds results among lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Results:
    """Holds the lines of some files, those of later files and later runs last."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Results:
        """Reads files; a line that was cut off in the middle is left out."""
        return cls(line for path in paths for line in map(_parsed, path.read_text().splitlines()) if line)

    def all(self, stage: str, what: str) -> list[Line]:
        return [line for line in self.lines if line["stage"] == stage and line["what"] == what]

    def last(self, stage: str, what: str, **fields: Any) -> Line | None:
        """Returns the last such line whose ``fields`` are these; None where there is none."""
        found = [line for line in self.all(stage, what) if all(line.get(k) == v for k, v in fields.items())]
        return found[-1] if found else None

    def latest(self, stage: str, what: str, key: Callable[[Line], Any]) -> list[Line]:
        """Returns the last line for each ``key``, in the order in which the keys came."""
        return list({json.dumps(key(line)): line for line in self.all(stage, what)}.values())


def _parsed(line: str) -> Line | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and {"stage", "what"} <= found.keys() else None
