"""Writes rows of cells as an aligned table of plain text, for whatever prints one."""

from __future__ import annotations

from collections.abc import Container, Sequence
from importlib import import_module
from io import StringIO

_NO_LIMIT = 1_000_000


def table_lines(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Returns a line for each row, without spaces at its end; a cell is as wide as it shows on a terminal.

    Args:
        rows: of equally many cells each, headings included.
        left: the numbers of the columns that are aligned to the left; the others are to the right.
    """
    if not rows:
        return []
    text = import_module("rich.text").Text
    table = import_module("rich.table").Table.grid(padding=(0, 2, 0, 0))
    for number in range(len(rows[0])):
        table.add_column(justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(text, row))
    file = StringIO()
    plain = {"color_system": None, "force_terminal": False, "force_jupyter": False}
    import_module("rich.console").Console(file=file, width=_NO_LIMIT, **plain).print(table)
    return [line.rstrip() for line in file.getvalue().split("\n")[:-1]]
