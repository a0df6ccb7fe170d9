"""Manages the folder of a run: its files, its config, and the lock that keeps it to one process.

The lock is on the file `lock` in the folder, whose text names its holder. The operating system frees the lock when its
process ends, however that ends: a `lock` file that is left over means nothing. The holder removes the file, so a
process that has locked it checks that it is still the one in the folder.
"""

import fcntl
import json
import os
import secrets
import shlex
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from smet_compile.format.arguments import described
from smet_compile.pretrain.config import OPTION_TYPES, RunConfig, resolve
from smet_compile.pretrain.world import start_command

LOCK_MARK = "smet_compile pretrain"
MOST_LOCK_BYTES = 500
FIRST_OPTIONS = ("preset", "method", "density", "block", "steps", "batch", "sequence", "lr", "every", "seed")
"""Options that every version has written: a file with fewer than half of them is not that of a run."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a new file beside `path`, flushes it to disk, then renames it to `path`.

    After a power cut the file is whole or absent. The file beside has a name of its own; those that killed processes
    left behind are removed first.
    """
    for left in path.parent.glob(escape(path.name) + ".*tmp"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_config(path: Path, config: RunConfig) -> None:
    """Writes `config` as JSON; the file appears whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(asdict(config), indent=2) + "\n"))


def read_config(path: Path) -> RunConfig:
    """Returns the config that `write_config` wrote, in this version or an older one.

    An option that is missing, such as one that was added later, gets the default that follows from the others: an
    option is added with the default under which older runs go on as they were. Raises ValueError, which names the file
    and the option, for unknown options (of a newer version), wrong values, and a file that is no run's.
    """
    values = _read_json(path)
    missing = [name for name in FIRST_OPTIONS if name not in values]
    if 2 * len(missing) > len(FIRST_OPTIONS):
        raise ValueError(f"{path}: expected the options of a run, got a file without {', '.join(missing)}; restore it")
    unknown = {name: value for name, value in values.items() if name not in OPTION_TYPES}
    if unknown:
        named = ", ".join(f"{name}: {described(value)}" for name, value in sorted(unknown.items()))
        raise ValueError(
            f"{path}: expected options that this version knows, got {named}; resume with the version that wrote them, "
            "or take them out of the file to go on without them"
        )
    try:
        return resolve(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore the file, or begin a new run with --out") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror}; restore it") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}; begin a new run with --out") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: expected a JSON object of options, got {described(values)}; begin a new run with --out"
        )
    return values


@dataclass(frozen=True)
class RunFolder:
    """Names the files of a run. A folder holds one run, and counts as one from the moment `config.json` is there."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def resume_command(self) -> str:
        return f"{start_command()} pretrain --resume {shlex.quote(str(self.path))}"

    def expect_free(self) -> None:
        """Raises ValueError where another run, or a file that a run would replace, lives here."""
        if self._exists(self.config, "--out"):
            raise ValueError(
                f"--out: expected a folder without a run, got {self.path}, which holds one; "
                f"go on with it ({self.resume_command}) or choose another folder"
            )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out: expected a folder, got a file: {self.path}; choose another name")
        for path in (self.metrics, self.checkpoint, self.report):
            if path.exists():
                raise ValueError(
                    f"--out: expected a folder without a run, got {self.path}, which has no config.json but holds "
                    f"{path.name}; choose another folder"
                )

    def create(self, config: RunConfig) -> None:
        """Makes the folder, which is there, a run."""
        write_config(self.config, config)

    def open(self, argument: str = "--resume") -> RunConfig:
        """Returns the config of the run that lives here; a ValueError names `argument` where there is none."""
        if not self._exists(self.config, argument):
            found = (
                "a folder without one" if self.path.is_dir() else "a file" if self.path.exists() else "no such folder"
            )
            raise ValueError(
                f"{argument}: expected the folder of a run (with config.json), got {found}: {self.path}; "
                "begin a run with --out"
            )
        return read_config(self.config)

    def _exists(self, path: Path, option: str) -> bool:
        try:
            return path.exists()
        except OSError as error:
            raise ValueError(
                f"{option}: expected a folder, got {self.path} ({error.strerror}); choose another one"
            ) from error

    def remove_lone_checkpoint(self) -> None:
        """Removes a folder that holds nothing but a checkpoint: saving made it where the run's own was removed."""
        with suppress(OSError):
            if list(self.path.iterdir()) == [self.checkpoint]:
                self.checkpoint.unlink()
                self.path.rmdir()


class RunLock(AbstractContextManager["RunLock"]):
    """Holds the folder of a run between `with` and its end; makes the folder where there is none.

    `option` is the command-line option that names the folder. Entering raises ValueError where another process
    holds the folder, or nothing can be written there. Folders that it made are removed again at the end, if they are
    empty and nobody called `keep_folder`.
    """

    def __init__(self, folder: Path, option: str) -> None:
        self._folder, self._option = folder, option
        self._new_folders: list[Path] = []
        self._handle = -1

    @property
    def path(self) -> Path:
        return self._folder / "lock"

    def __enter__(self) -> "RunLock":
        try:
            self._new_folders = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
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
        """Lets the folder stay at the end: there is a run in it."""
        self._new_folders = []

    def renew(self) -> None:
        """Locks anew where the file `lock` was removed; ValueError where another process was faster."""
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
                    os.pwrite(handle, _holder_text().encode(), 0)
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
                f"{_lock_text(handle) or 'a process that is just starting'}; wait for it, stop it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{self._folder}: this file system has no locks ({error.strerror}); see to it yourself that no other "
                "process trains in this folder",
                stacklevel=2,
            )
        if (text := _lock_text(handle)) and not text.startswith(LOCK_MARK):
            raise ValueError(f"{self.path}: expected no file of this name that is not ours, got one with the text "
                             f"{described(text)}; choose another folder")  # fmt: skip

    def _remove_folders(self) -> None:
        with suppress(OSError):
            for path in self._new_folders:
                path.rmdir()


def _holder_text() -> str:
    return (
        f"{LOCK_MARK}, process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"
    )


def _lock_text(handle: int) -> str:
    return os.pread(handle, MOST_LOCK_BYTES, 0).decode(errors="replace").strip("\0\n ")


def _is_at(path: Path, handle: int) -> bool:
    """Returns whether the open file `handle` is the one that `path` names now."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except OSError:
        return False
