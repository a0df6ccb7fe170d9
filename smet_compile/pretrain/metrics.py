"""Writes, reads and mends metrics.jsonl, the log of a run.

The file holds one JSON object a line, each with `kind` and `step`. The kinds are train, eval, topology, bytes and end,
and gap: the steps from `first_step` to `step` were trained, and their records lost.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import smet_compile as smet
from smet_compile.format.arguments import described
from smet_compile.pretrain.folder import write_atomically
from smet_compile.pretrain.memory import BYTE_KINDS
from smet_compile.runtime.history import FRACTIONS

Record = dict[str, Any]
Ranges = list[tuple[int, int]]
MOST_RANGES = 3

COUNT = (int,)
NUMBER = (int, float)
NUMBER_OR_NULL = (int, float, type(None))
BYTES = {
    "num_weights": COUNT,
    "run": dict.fromkeys(BYTE_KINDS, COUNT),
    "dense": dict.fromkeys(BYTE_KINDS, COUNT),
}
SITE = {
    "churn_fraction": NUMBER,
    "grown_survival_fraction": NUMBER_OR_NULL,
    "mean_age": NUMBER_OR_NULL,
    "explored_fraction": NUMBER,
}
EVENT = {"step": COUNT, "drop_fraction": NUMBER, "num_dropped": COUNT, "churn_fraction": NUMBER, "sites": dict}
RECORDS: dict[str, dict[str, Any]] = {
    "train": {"loss": NUMBER, "lr": NUMBER, "seconds": NUMBER},
    "eval": {"loss": NUMBER},
    "topology": {"event": EVENT},
    "bytes": {"sparse": BYTES, "all": BYTES},
    "gap": {"first_step": COUNT},
    "end": {},
}
OPTIONAL = ("lr", "seconds")
TYPE_NAMES = {COUNT: "a whole number of at least 0", NUMBER: "a number", NUMBER_OR_NULL: "a number or null"}


def check_record(record: object) -> Record:
    """Returns `record`; a ValueError says what is wrong with it. Kinds of a newer version need `step` alone."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with kind and step, got {described(record)}")
    if not isinstance(record.get("kind"), str):
        raise ValueError(f"expected a text called kind, got {described(record.get('kind'))}")
    _check(record, {"step": COUNT, **RECORDS.get(record["kind"], {})}, record["kind"])
    if record["kind"] == "topology":
        for name, site in record["event"]["sites"].items():
            _check(site, SITE, f"topology.event.sites.{name}")
    return record


def _check(value: Any, shape: Any, where: str) -> None:
    """Compares `value` with `shape`: a dict of shapes by key, `dict` for any JSON object, or a tuple of types."""
    if isinstance(shape, Mapping) or shape is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, got {described(value)}")
        for key, inner in shape.items() if isinstance(shape, Mapping) else ():
            if key in value:
                _check(value[key], inner, f"{where}.{key}")
            elif key not in OPTIONAL:
                raise ValueError(f"{where}: expected {key}, got a record without it")
    elif isinstance(value, bool) or not isinstance(value, shape) or (shape is COUNT and value < 0):
        raise ValueError(f"{where}: expected {TYPE_NAMES[shape]}, got {described(value)}")


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """Returns the records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def event_values(event: smet.TopologyEvent) -> dict[str, Any]:
    """Returns the values under `event` of a topology record."""
    values = event.to_dict()
    for name, site in event.sites.items():
        values["sites"][name] |= _fractions(site)
    return values | {"num_dropped": event.num_dropped} | _fractions(event.total)


def _fractions(counts: smet.SiteEvent) -> dict[str, float | None]:
    return {name: getattr(counts, name) for name in FRACTIONS}


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends records to a file; a line is in the operating system's hands when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends one record.

        Raises OSError where there is no room for all of it, ValueError where the file was removed or replaced.
        """
        self.expect_in_place()
        line = (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def track(self, step: int, numbers: Mapping[str, float]) -> None:
        """Does nothing: a file takes records alone."""

    def sync(self) -> None:
        """Returns when all that was written is on disk: a checkpoint is never ahead of its log."""
        self.expect_in_place()
        os.fsync(self._file.fileno())

    def is_in_place(self) -> bool:
        """Returns whether the file's path still names the file."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def expect_in_place(self) -> None:
        """Raises ValueError where the file, or a folder above it, was removed, moved or replaced."""
        if not self.is_in_place():
            raise ValueError(
                f"{self._path.parent}: expected the run's folder to stay as it is, but its {self._path.name} was "
                "removed, moved or replaced while the run went on; the run has ended here and wrote nothing more"
            )

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoLog(MetricsLog):
    """Writes nothing, on the ranks of a run that are not the first."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def is_in_place(self) -> bool:
        """Returns True: there is no file."""
        return True

    def close(self) -> None:
        """Does nothing."""


def is_finished(path: Path) -> bool:
    """Returns whether the last step of the run with this log was taken and saved."""
    records = read_metrics(path)
    return bool(records) and records[-1]["kind"] == "end"


def read_metrics(path: Path) -> list[Record]:
    """Returns all whole records of the file, in order; a torn last line (a killed run) is left out.

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
    """Replaces the file by one with these records; it is on disk when this returns."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def cut_back(path: Path, step: int) -> None:
    """Removes all records after `step`, so that a resumed run writes each record once."""
    write_metrics(path, [r for r in read_metrics(path) if r["step"] <= step and r["kind"] != "end"])


def mend_metrics(path: Path, step: int, history: Sequence[smet.TopologyEvent] = ()) -> str | None:
    """Makes the log hold the records up to the checkpoint of `step`, once each, and none after it.

    Records after `step` are removed: the run writes them again. Steps without a record, as after a power cut, become
    records of kind "gap"; lost topology updates are taken from `history`, which the checkpoint holds. Returns a line
    that says which records were missing, or None where none were.
    """
    cut_back(path, step)
    records = read_metrics(path)
    ranges = steps_without_record(records, step)
    new = set(ranges) - {(record["first_step"], record["step"]) for record in of_kind(records, "gap")}
    if not new:
        return None
    kept = [record for record in records if record["kind"] != "gap"]
    gaps = [{"kind": "gap", "step": last, "first_step": first} for first, last in ranges]
    write_metrics(path, sorted([*kept, *gaps, *_lost_updates(records, step, history)], key=lambda r: r["step"]))
    return (
        f"warning: {path}: the log is behind the checkpoint, as after a power cut: {count_steps(ranges)} of {step} "
        f"steps have no record ({ranges_text(ranges)}); they are marked as a gap, and the run goes on from step {step}"
    )


def _lost_updates(records: list[Record], step: int, history: Sequence[smet.TopologyEvent]) -> list[Record]:
    recorded = {record["step"] for record in of_kind(records, "topology")}
    lost = [event for event in history if event.step <= step and event.step not in recorded]
    return [{"kind": "topology", "step": event.step, "event": event_values(event)} for event in lost]


def steps_without_record(records: list[Record], last: int) -> Ranges:
    """Returns the steps from 1 to `last` that have no train record, as (first, last) of each range."""
    known = {record["step"] for record in of_kind(records, "train") if 1 <= record["step"] <= last}
    edges = [0, *sorted(known), last + 1]
    return [(before + 1, after - 1) for before, after in pairwise(edges) if after - before > 1]


def count_steps(ranges: Ranges) -> int:
    """Returns the number of steps in the ranges."""
    return sum(last - first + 1 for first, last in ranges)


def ranges_text(ranges: Ranges) -> str:
    """Writes ranges as "8 to 20, 33"."""
    written = [str(first) if first == last else f"{first} to {last}" for first, last in ranges[:MOST_RANGES]]
    return ", ".join(written) + (f" and {len(ranges) - MOST_RANGES} more" if len(ranges) > MOST_RANGES else "")
