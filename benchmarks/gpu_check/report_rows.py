"""Makes rows of lines that may be missing."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu_check.results import Line
from benchmarks.tables import AWAITS_GPU, Row, Target


def row(what: str, line: Line | None, read: Callable[[Line], Row], target: Target | None = None) -> Row:
    """Returns what ``read`` makes of a line; a row without a number where it is missing or tells of a failure."""
    if line is None:
        return Row(what, target=target, unmeasured=AWAITS_GPU)
    if "failed" in line or "skipped" in line:
        return Row(what, target=target, unmeasured="failed" if "failed" in line else line["skipped"])
    return read(line)
