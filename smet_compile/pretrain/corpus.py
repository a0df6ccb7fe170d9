"""Finds and reads the files of a local text, as fast as the disk gives them."""

import os
import random
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
FILES_AHEAD = 256
"""Files that the disk is asked for before they are read; a process may have 1,024 open."""
PIECE_BYTES = 2**24
"""Bytes that are asked for at once, beyond those that a file's size announces."""


def stdlib_paths() -> list[Path]:
    """Returns the Python files of the standard library, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def text_paths(pattern: str) -> list[Path]:
    """Returns the files that match the glob `pattern`, sorted; a ValueError if there are none."""
    names = [name for name in glob(pattern, recursive=True) if os.path.isfile(name)]
    paths = [Path(name) for name in sorted(names, key=lambda name: name.split(os.sep))]  # as paths themselves compare
    if not paths:
        found = "a folder; add /*.txt, say" if os.path.isdir(pattern) else "none; check the path and quote the glob"
        raise ValueError(f"--data: expected files that match {pattern!r}, got {found}")
    return paths


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Yields the texts of all files, in an order that is mixed but always the same.

    Raises ValueError, which names the file, where one cannot be read or is no text in UTF-8.
    """
    for path, content in _contents(random.Random(0).sample(paths, len(paths))):
        text = content.decode("utf-8", errors="replace")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\0" in text:
            raise ValueError(
                f"--data: expected text in UTF-8, got {path}, which holds NUL characters; leave that file out"
            )
        yield text


def _contents(paths: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    """Yields each file with its content; the disk is asked for the next ones meanwhile."""
    ahead: deque[tuple[Path, int]] = deque()
    try:
        for path in paths:
            ahead.append((path, _open(path)))
            if len(ahead) == FILES_AHEAD:
                yield _read(*ahead.popleft())
        while ahead:
            yield _read(*ahead.popleft())
    finally:
        for _, handle in ahead:
            os.close(handle)


def _open(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(path, error) from error
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
    return handle


def _read(path: Path, handle: int) -> tuple[Path, bytes]:
    try:
        size = os.fstat(handle).st_size
        content = os.read(handle, size + 1)
        while len(content) != size and (more := os.read(handle, PIECE_BYTES)):
            content += more
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(handle)
    return path, content


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"--data: expected files that can be read, got {path} ({error.strerror}); leave that file out")
