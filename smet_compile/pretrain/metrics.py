"""metrics.jsonl: one JSON object a line, each with `kind` (train, eval, topology, bytes, end) and `step`."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from smet_compile.pretrain.config import write_atomically

Record = dict[str, Any]


class MetricsLog:
    """Appends records to a file; a line is in the operating system's hands when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record, or raise OSError where there is no room for all of it."""
        line = (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """All whole records of the file, in order; a torn last line (a killed run) is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def cut_back(path: Path, step: int) -> None:
    """Remove what was recorded after `step`, so that a resumed run writes each record once."""
    kept = [record for record in read_metrics(path) if record["step"] <= step and record["kind"] != "end"]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]
