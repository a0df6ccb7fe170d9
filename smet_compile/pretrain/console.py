"""Prints to the terminal: text as it is, the progress of a run, and the warning about dead units.

Paths, globs and names hold whatever characters a user likes. Progress is a live bar on a terminal and a plain line now
and then elsewhere.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, NoReturn, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from smet_compile.microscope import dead_units
from smet_compile.ops import find_sites
from smet_compile.tables import table_lines

PLAIN_LINES = 20
PLAIN_SECONDS = 30.0
MOST_NAMES = 3
FAILED = 2


def print_plainly(console: Any, text: str) -> None:
    """Prints one line on a `rich.console.Console`: no markup, no emoji codes, no colours, no line breaks added."""
    console.print(as_cell(text), soft_wrap=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows, headings first, as a table of the terminal's width, and as plain text where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        print("\n".join(table_lines(rows)))
        return
    table = Table(header_style="bold")
    for number, title in enumerate(rows[0]):
        table.add_column(as_cell(title), justify="right" if number else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(as_cell, row))
    console.print(table)


def print_line(text: str) -> None:
    """Prints a line, broken between words where a terminal is narrower."""
    console = Console()
    console.print(as_cell(text), soft_wrap=not console.is_terminal)


def as_cell(text: str, style: str = "") -> Any:
    """Returns `text` for a cell or a title of a rich table, in which square brackets are square brackets."""
    return Text(text, style)


def end_with_error(error: Exception) -> NoReturn:
    """Prints the error as one line on standard error, and ends the process with exit code 2."""
    print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
    sys.exit(FAILED)


def print_any_character() -> None:
    """Makes standard output write characters that its encoding lacks as escapes, as standard error does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@dataclass(frozen=True)
class Status:
    """Holds the numbers that are shown after a step; `next_update` is a step number, None where no update will come."""

    step: int
    loss: float
    tokens_per_second: float
    density: float
    next_update: int | None

    def __str__(self) -> str:
        update = "no more updates" if self.next_update is None else f"next update {self.next_update}"
        return f"loss {self.loss:.3f}  {self.tokens_per_second:,.0f} tok/s  density {self.density:.3f}  {update}"


class Display(Protocol):
    """Shows a `Status` after each step, between `with` and its end."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, status: Status) -> None:
        """Shows the newest status."""
        ...


class LiveProgress(AbstractContextManager["LiveProgress"]):
    """Shows a bar with the time that is left, and the status in a line below, as wide as the terminal."""

    def __init__(self, console: Any, first: int, steps: int) -> None:
        self._bar = _BarOverStatus(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=steps, completed=first)

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, status: Status) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=status.step, description=str(status))


class _BarOverStatus(Progress):
    """Draws the bar of its task, and the description below it."""

    def get_renderables(self) -> Iterable[Any]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield as_cell(task.description)


class PlainProgress(AbstractContextManager["PlainProgress"]):
    """Prints about twenty lines a run, and one every half minute in a long one."""

    def __init__(self, console: Any, first: int, steps: int) -> None:
        self._console, self._first, self._steps = console, first, steps
        self._printed = time.monotonic()

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, status: Status) -> None:
        """Prints the status where a line is due."""
        due = status.step % max(1, self._steps // PLAIN_LINES) == 0 or time.monotonic() - self._printed > PLAIN_SECONDS
        if due or status.step in (self._first + 1, self._steps):
            print_plainly(self._console, f"step {status.step}/{self._steps}  {status}")
            self._printed = time.monotonic()


def open_progress(console: Any, first: int, steps: int) -> Display:
    """Returns the progress display that suits the console (a `rich.console.Console`)."""
    return (LiveProgress if console.is_terminal else PlainProgress)(console, first, steps)


class DeadUnitWarning:
    """Warns once of each layer that has units without any active weight.

    `console` is a `rich.console.Console`.
    """

    def __init__(self, console: Any) -> None:
        self._console = console
        self._warned: set[str] = set()

    def check(self, model: nn.Module) -> None:
        """Looks at all topologies; call it at the start and after each topology update. It is linear in their bits."""
        found = {name: dead_units(site) for name, site in find_sites(model).items()}
        new = [name for name, dead in found.items() if dead and name not in self._warned]
        if not new:
            return
        self._warned.update(new)
        inputs = sum(int(found[name].inputs.sum()) for name in new)
        outputs = sum(int(found[name].outputs.sum()) for name in new)
        named = ", ".join(new[:MOST_NAMES]) + (f" and {len(new) - MOST_NAMES} more" if len(new) > MOST_NAMES else "")
        print_plainly(
            self._console,
            f"warning: {named}: {inputs:,} inputs and {outputs:,} outputs without an active weight; a higher --density "
            "or a smaller --block avoids that, `inspect` shows where they are",
        )
