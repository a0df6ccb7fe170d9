"""Keeps results on disk, one JSON record a line, appended as runs end, so that a study goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


class Records:
    """Holds the records of one study, by the key of their case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the machine stopped while it wrote
            path.write_text(whole)
        self._by_key = {record["key"]: record for record in map(json.loads, whole.splitlines())}

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[dict]:
        return iter(self._by_key.values())

    def __getitem__(self, key: str) -> dict:
        return self._by_key[key]

    def add(self, record: dict) -> None:
        """Keeps a record, here and on disk."""
        self._by_key[record["key"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
