"""Prints text as it is: paths, globs and names hold whatever characters a user likes."""

import sys
from io import TextIOWrapper
from typing import Any, NoReturn

from smet_compile.pretrain.extras import require


def print_plainly(console: Any, text: str) -> None:
    """Print one line on a `rich.console.Console`: no markup, no emoji codes, no colours, no line breaks added."""
    console.print(as_cell(text), soft_wrap=True)


def as_cell(text: str, style: str = "") -> Any:
    """Return `text` for a cell or a title of a rich table, in which square brackets are square brackets."""
    return require("rich.text").Text(text, style)


def end_with_error(error: Exception) -> NoReturn:
    """Print the error as one line on standard error, and end the process with exit code 2."""
    print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
    sys.exit(2)


def print_any_character() -> None:
    """Let standard output write what its encoding lacks as an escape, as standard error does, instead of failing."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
