"""How a run looks while it goes: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from smet_compile.pretrain.console import print_plainly
from smet_compile.pretrain.extras import require

PLAIN_LINES = 20
PLAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Status:
    """What there is to show after a step; `next_update` is a step number, None where no update will come."""

    step: int
    loss: float
    tokens_per_second: float
    density: float
    next_update: int | None

    def __str__(self) -> str:
        update = "no more updates" if self.next_update is None else f"next update {self.next_update}"
        return f"loss {self.loss:.3f}  {self.tokens_per_second:,.0f} tok/s  density {self.density:.3f}  {update}"


class Progress(Protocol):
    """Shows a `Status` after each step, between `with` and its end."""

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, status: Status) -> None:
        """Show the newest status."""
        ...


class LiveProgress(AbstractContextManager["LiveProgress"]):
    """A bar that rewrites its line."""

    def __init__(self, console: Any, first: int, steps: int) -> None:
        bars = require("rich.progress")
        columns = (
            bars.BarColumn(bar_width=8),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.description}", markup=False),
        )
        self._bar = bars.Progress(*columns, bars.TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("starting", total=steps, completed=first)

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, status: Status) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=status.step, description=str(status))


class PlainProgress(AbstractContextManager["PlainProgress"]):
    """About twenty lines a run, and one every half minute in a long one."""

    def __init__(self, console: Any, first: int, steps: int) -> None:
        self._console, self._first, self._steps = console, first, steps
        self._printed = time.monotonic()

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, status: Status) -> None:
        """Print the status where a line is due."""
        due = status.step % max(1, self._steps // PLAIN_LINES) == 0 or time.monotonic() - self._printed > PLAIN_SECONDS
        if due or status.step in (self._first + 1, self._steps):
            print_plainly(self._console, f"step {status.step}/{self._steps}  {status}")
            self._printed = time.monotonic()


def open_progress(console: Any, first: int, steps: int) -> Progress:
    """The progress display that suits the console (a `rich.console.Console`)."""
    return (LiveProgress if console.is_terminal else PlainProgress)(console, first, steps)
