"""A file written whole: under a name of its own beside its place, on disk, then renamed.

Whoever writes holds a lock on the file of that name. One that nobody holds was left by a process that was killed; the
next one to write to the same place removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = ".tmp-smet-"


@contextmanager
def whole_file(path: Path) -> Iterator[int]:
    """Yields the descriptor of a new file, which takes the place of ``path`` when the block ends.

    If the block raises, the new file is removed and ``path`` stands as it was. Several processes may write to one path
    at a time; the file of the last one stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, file = _create(path)
    try:
        yield file
        os.fsync(file)
        os.replace(partial, path)
        flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    _sweep(path)


def flush_folder(path: Path) -> None:
    """Makes sure that the entries of a folder are on disk."""
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _prefix(path: Path) -> str:
    """The start of the names of files that become ``path``; short, however long its name is."""
    return f"{_MARK}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _create(path: Path) -> tuple[Path, int]:
    """Creates and locks a file; anew where another process took it for a leftover before it was locked."""
    while True:
        partial = path.with_name(_prefix(path) + secrets.token_hex(8))
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can take it for a leftover
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink > 0:
            return partial, file
        os.close(file)


def _sweep(path: Path) -> None:
    """Removes what killed processes left when they wrote to ``path``. Where that fails, nothing is lost."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(_prefix(path)):
                _remove_unlocked(path.with_name(name))


def _remove_unlocked(leftover: Path) -> None:
    with contextlib.suppress(OSError):
        file = os.open(leftover, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
        finally:
            os.close(file)
