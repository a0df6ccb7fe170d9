"""Keeps compiled code in files that are written whole or not at all, and proven whole before they are used.

An entry is the code and after it a SHA-256 of the entry's name and the code. Power losses and full disks damage files,
and a process that loads a damaged library dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from smet_compile.ops.kernels.native.trust import is_trusted

_DIGEST_BYTES = hashlib.sha256().digest_size
_PREFIX = "smet_compile_workplace_"
_ABANDONED_AFTER_S = 3600.0


def read(entry: Path) -> bytes | None:
    """Returns the code that ``entry`` keeps; None where it is missing, damaged, or another user could have written it.

    The entry lies in a trusted folder. It is opened once, and what was checked is what is returned.
    """
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not is_trusted(status):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return code if digest == _digest(entry, code) else None


def write(entry: Path, code: bytes, workplace: Path) -> None:
    """Keeps ``code`` as ``entry``, through ``workplace``, a folder of the same file system.

    Raises OSError where that cannot be done; then there is what was there before.
    """
    new = workplace / "whole"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # whatever the umask, no group may write
    with open(descriptor, "wb") as file:
        file.write(code + _digest(entry, code))
        file.flush()
        os.fsync(descriptor)
    _sync(workplace)
    new.replace(entry)
    _sync(entry.parent)


@contextlib.contextmanager
def new_workplace(folder: Path) -> Iterator[Path]:
    """Makes a folder in ``folder`` for this user alone and removes it, as it does those that killed processes left."""
    for each in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_abandoned(each.lstat()):
                shutil.rmtree(each)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX, ignore_cleanup_errors=True) as made:
        yield Path(made)


def _is_abandoned(status: os.stat_result) -> bool:
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_ours and time.time() - status.st_mtime > _ABANDONED_AFTER_S


def _digest(entry: Path, code: bytes) -> bytes:
    return hashlib.sha256(entry.name.encode() + b"\0" + code).digest()


def _sync(folder: Path) -> None:
    """Makes the names in ``folder`` outlast a power loss, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
