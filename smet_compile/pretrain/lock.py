"""One run folder, one process: a lock on the file `lock` in the folder, whose text names the holder.

The operating system frees the lock when its process ends, however that ends: a `lock` file that is left over says
nothing. The holder removes the file, so who has locked it checks that it is still the one in the folder.
"""

import fcntl
import os
import socket
import time
import warnings
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from smet_compile.pretrain.option_values import shown

BEGINNING = "smet_compile pretrain"
MOST_BYTES = 500


class RunLock(AbstractContextManager["RunLock"]):
    """Holds the folder of a run between `with` and its end; makes the folder where there is none.

    `option` is the command-line option that names the folder. Entering raises ValueError where another process
    holds the folder, or nothing can be written there. Folders that it made are removed again at the end, if they are
    empty and nobody called `keep_folder`.
    """

    def __init__(self, folder: Path, option: str) -> None:
        self._folder, self._option = folder, option
        self._made: list[Path] = []
        self._handle = -1

    @property
    def path(self) -> Path:
        return self._folder / "lock"

    def __enter__(self) -> "RunLock":
        try:
            self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            self._handle = self._make_and_acquire()
        except BaseException as error:
            self._remove_folders()
            if not isinstance(error, OSError):
                raise
            raise ValueError(
                f"{self._option}: expected a folder that can be written, got {self._folder} "
                f"({error.strerror or error}); choose another one, or change what is in the way"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            if _is_at(self.path, self._handle):
                self.path.unlink()
        os.close(self._handle)
        self._remove_folders()

    def keep_folder(self) -> None:
        """Let the folder stay at the end: there is a run in it."""
        self._made = []

    def renew(self) -> None:
        """Lock anew where the file `lock` was removed; ValueError where another process was faster."""
        if not _is_at(self.path, self._handle):
            before, self._handle = self._handle, self._acquire()
            os.close(before)

    def _make_and_acquire(self) -> int:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process, which had made the folder, has just removed it
                return self._acquire()

    def _acquire(self) -> int:
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                self._lock(handle)
                if _is_at(self.path, handle):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, _holder().encode(), 0)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self._option}: expected a run folder that no other process uses, got {self._folder}, held by "
                f"{_text(handle) or 'a process that is just starting'}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{self._folder}: this file system has no locks ({error.strerror}); see to it yourself that no other "
                "process trains in this folder",
                stacklevel=2,
            )
        if (text := _text(handle)) and not text.startswith(BEGINNING):
            raise ValueError(f"{self.path}: expected no file of this name that is not ours, got one with the text "
                             f"{shown(text)}; choose another folder")  # fmt: skip

    def _remove_folders(self) -> None:
        with suppress(OSError):
            for path in self._made:
                path.rmdir()


def _holder() -> str:
    return (
        f"{BEGINNING}, process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"
    )


def _text(handle: int) -> str:
    return os.pread(handle, MOST_BYTES, 0).decode(errors="replace").strip("\0\n ")


def _is_at(path: Path, handle: int) -> bool:
    """Return whether the open file `handle` is the one that `path` names now."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except OSError:
        return False
