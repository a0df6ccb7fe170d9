"""Writes results as lines of JSON, and holds what every stage is given."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.settings import Settings

Size = TypeVar("Size")
_ROUNDED = 6


class Record:
    """Appends lines to a file, each whole and at once, and prints them. Several processes may write to one file."""

    def __init__(self, path: Path, stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._stage = stage

    def __call__(self, what: str, **fields: Any) -> None:
        line = json.dumps({"stage": self._stage, "what": what, **{k: _plain(v) for k, v in fields.items()}})
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)
        sys.stdout.write(f"{line}\n")  # in one piece, as others write there too
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Returns a float of few digits, and anything else that JSON has no form for as text."""
    if isinstance(value, float):
        return float(f"{value:.{_ROUNDED}g}")
    return value if isinstance(value, (int, str, bool, list, dict, type(None))) else str(value)


@dataclass(frozen=True)
class Check:
    """Holds what a stage is given.

    Args:
        record: writes a result. dry: tiny sizes on the CPU. folder: for what nobody keeps.
        deadline: when the stage is ended, by ``time.monotonic``.
    """

    record: Record
    dry: bool
    folder: Path
    deadline: float

    def left(self) -> float:
        """Returns the seconds until the stage is ended."""
        return self.deadline - time.monotonic()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def size(self, full: Size, tiny: Size) -> Size:
        return tiny if self.dry else full

    def settings(self, repeats: int) -> Settings:
        return Settings(self.size(repeats, 1), self.dry, self.device)

    def synchronize(self) -> None:
        """Waits for the GPU; raises what has gone wrong on it."""
        if not self.dry:
            torch.cuda.synchronize()

    @contextmanager
    def attempt(self, what: str, **fields: Any) -> Iterator[None]:
        """Records an error as a result, so that the next attempt is made; an error that stays on the GPU ends all."""
        try:
            yield
            self.synchronize()
        except Exception as error:
            self.record(what, **fields, failed=f"{type(error).__name__}: {str(error)[:500]}")
            self.synchronize()

    @contextmanager
    def alone(self) -> Iterator[float]:
        """Waits until no other stage measures; yields the seconds waited."""
        start = time.perf_counter()
        with (self.folder / "measuring.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield time.perf_counter() - start
