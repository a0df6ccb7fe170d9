"""metrics.jsonl: one JSON object a line, each with `kind` and `step`; `records.py` says what each kind holds.

The kinds are train, eval, topology, bytes and end, and gap: the steps from `first_step` to `step` were trained, and
their records lost (`mend.py`).
"""

import errno
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from smet_compile.pretrain.durable import write_atomically
from smet_compile.pretrain.records import Record, check_record, of_kind

__all__ = ["MetricsLog", "Record", "cut_back", "of_kind", "read_metrics", "write_metrics"]


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends records to a file; a line is in the operating system's hands when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record.

        Raises OSError where there is no room for all of it, ValueError where the file was removed or replaced.
        """
        self.expect_in_place()
        line = (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Return when all that was written is on disk: a checkpoint is never ahead of its log."""
        self.expect_in_place()
        os.fsync(self._file.fileno())

    def is_in_place(self) -> bool:
        """Return whether the file's path still names the file."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def expect_in_place(self) -> None:
        """Raise ValueError where the file, or a folder above it, was removed, moved or replaced."""
        if not self.is_in_place():
            raise ValueError(
                f"{self._path.parent}: expected the run's folder to stay as it is, but its {self._path.name} was "
                "removed, moved or replaced while the run went on; the run has ended here and wrote nothing more"
            )

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """All whole records of the file, in order; a torn last line (a killed run) is left out.

    Raises ValueError, which names file and line, for a line that holds no record.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror}; restore it") from error
    return [_read_record(path, number, line) for number, line in enumerate(lines, 1)]


def _read_record(path: Path, number: int, line: bytes) -> Record:
    try:
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a record as JSON, got {error}") from error
        return check_record(record)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: {error}; restore the file, or take the line out: the run then goes on, and "
            "its report says which steps have no record"
        ) from error


def write_metrics(path: Path, records: list[Record]) -> None:
    """Replace the file by one with these records; it is on disk when this returns."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def cut_back(path: Path, step: int) -> None:
    """Remove what was recorded after `step`, so that a resumed run writes each record once."""
    write_metrics(path, [r for r in read_metrics(path) if r["step"] <= step and r["kind"] != "end"])
