"""Shows results in notebooks: tables in HTML, and rows for pandas."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from html import escape
from importlib import import_module
from typing import Any

_SCROLLS = 'style="max-height: 36em; overflow: auto"'
"""The table of a large model scrolls instead of filling the page."""


def html_view(title: str, *parts: str) -> str:
    """Returns HTML of a title, which is escaped, and of parts, which ``html_table`` and ``html_lines`` made."""
    return f"<div><p><strong>{escape(title)}</strong></p>{''.join(parts)}</div>"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Returns a table in HTML whose cells are shown as they are, whatever they hold.

    Args:
        columns: the headings.
        rows: as many cells each as there are headings.
        left: the numbers of the columns that are aligned to the left; the others are to the right.
    """
    sides = ["left" if number in left else "right" for number in range(len(columns))]
    head = _html_row("th", columns, sides)
    body = "\n".join(_html_row("td", row, sides) for row in rows)
    return f"<div {_SCROLLS}><table>\n<thead>{head}</thead>\n<tbody>{body}</tbody></table></div>\n"


def html_lines(lines: Iterable[str]) -> str:
    """Returns a list in HTML with an entry for each line; an empty text without lines."""
    entries = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{entries}</ul>" if entries else ""


def html_text(text: str) -> str:
    """Returns aligned plain text as HTML that keeps it aligned; an empty text for none."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def _html_row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    shown = (
        f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(shown)}</tr>"


def frame_of(rows: list[dict[str, Any]]) -> Any:
    """Returns a ``pandas.DataFrame`` of the rows; the rows themselves where pandas is not installed."""
    try:
        pandas = import_module("pandas")
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        return rows
    return pandas.DataFrame(rows)
