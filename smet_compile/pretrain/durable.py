"""Files that survive a power cut: whole or absent, and on disk when the call returns."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file beside `path`, flush it to disk, then rename it to `path`.

    The file beside has a name of its own; those that killed processes left behind are removed first.
    """
    for left in path.parent.glob(escape(path.name) + ".*tmp"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
