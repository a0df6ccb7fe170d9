"""Compiles the C++ of this folder for the processor at hand, keeps the compiled code in files, and loads it.

A compiler (``CXX``, else g++ or clang++) is needed at run time, as torch.compile needs one. Where there is none, plain
torch computes instead. Compiled code is kept in ``SMET_COMPILE_CACHE``, else ``~/.cache/smet_compile``.

An entry of that folder is the code and after it a SHA-256 of the entry's name and the code. Power losses and full disks
damage files, and a process that loads a damaged library dies, so an entry is written whole or not at all and is checked
before it is used. Loaded code runs as this user, so the folder must be one that no other user can change; where it is
not, every process compiles for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from smet_compile.ops.threads import warn_of_spinning
from smet_compile.ops.torch_insides import warn_once

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_EXACT = ("-ffp-contract=off",)  # rounds as plain torch does, bit for bit
_MORE_FLAGS = {"adamw": _EXACT, "scale": _EXACT}
_loads = itertools.count()
_DIGEST_BYTES = hashlib.sha256().digest_size
_PREFIX = "smet_compile_workplace_"
_ABANDONED_AFTER_S = 3600.0
_MOST_LINKS = 40
_ROOT = Path("/")


def compiler() -> list[str] | None:
    """Returns the command of the C++ compiler; None where there is none."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]:
        try:
            words = shlex.split(command)
        except ValueError:  # an open quotation
            continue
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return [path, *words[1:]]
    return None


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Compiles and loads ``name``.cpp; None where that fails, with a warning unless no compiler is installed."""
    warn_of_spinning()
    cxx = compiler()
    if cxx is None or os.name != "posix":
        if os.environ.get("CXX"):
            _warn_of_plain_torch(f"CXX={os.environ['CXX']} was not found")
        return None
    try:
        return _load_or_compile(_entry_of(name, cxx), name, cxx)
    except subprocess.CalledProcessError as error:
        _warn_of_plain_torch(f"{name}.cpp did not compile ({_reason(error)})")
    except OSError as error:
        _warn_of_plain_torch(f"{name}.cpp could not be compiled or loaded ({error})")
    return None


def _warn_of_plain_torch(message: str) -> None:
    warn_once(f"smet_compile: {message}; plain torch is used")


def _entry_of(name: str, cxx: list[str]) -> Path | None:
    """Returns the path of the entry, whose name depends on all that the code is made from; None where none is kept."""
    sources = [*sorted(_HERE.glob("*.h")), _HERE / f"{name}.cpp"]
    program = Path(cxx[0]).resolve().stat()
    version = program.st_size, program.st_mtime_ns
    key = hashlib.sha256(repr((cxx, version, platform.libc_ver(), _flags(name), _processor())).encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = _cache_folder()
    return folder and folder / f"{name}-{key.hexdigest()[:20]}.so"


def _flags(name: str) -> tuple[str, ...]:
    return (*_FLAGS, *_MORE_FLAGS.get(name, ()))


def _load_or_compile(entry: Path | None, name: str, cxx: list[str]) -> ctypes.CDLL:
    """Loads what ``entry`` keeps; compiles anew where it is damaged, missing or cannot be loaded."""
    code = read_entry(entry) if entry else None
    if code is not None:
        with contextlib.suppress(OSError):
            return _load(code, entry or name)
    return _load(_compile(entry, name, cxx), entry or name)


def _load(code: bytes, name: Path | str) -> ctypes.CDLL:
    """Loads ``code`` from memory that no other process can change. ``name`` becomes the name of the library."""
    try:
        descriptor = os.memfd_create("smet_compile")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(code)
            # The loader returns an earlier library for a path that it knows, and numbers of descriptors are reused.
            loaded = ctypes.CDLL(f"/proc/self/{'./' * next(_loads)}fd/{descriptor}")
        finally:
            os.close(descriptor)
    except (AttributeError, OSError):  # without Linux, without /proc, or where such memory may not be executed
        with new_workplace(_temporary_folder()) as workplace:
            path = workplace / "loaded.so"
            path.write_bytes(code)
            loaded = ctypes.CDLL(str(path))
    loaded._name = str(name)
    return loaded


def _compile(entry: Path | None, name: str, cxx: list[str]) -> bytes:
    """Compiles the code and keeps it as ``entry``; where it cannot be kept, uses a temporary folder for compiling."""
    if entry is None:
        return _compile_without_keeping(name, cxx)
    code = None
    try:
        with new_workplace(entry.parent) as workplace:
            code = _run(workplace, name, cxx)
            write_entry(entry, code, workplace)
    except (OSError, subprocess.CalledProcessError) as error:  # the folder is read-only or full
        code = _compile_without_keeping(name, cxx) if code is None else code
        _warn_of_compiling_again(entry.parent, _reason(error))
    return code


def _compile_without_keeping(name: str, cxx: list[str]) -> bytes:
    with new_workplace(_temporary_folder()) as workplace:
        return _run(workplace, name, cxx)


def _run(workplace: Path, name: str, cxx: list[str]) -> bytes:
    """Runs the compiler, with all its files in ``workplace``."""
    output = workplace / f"{name}.so"
    command = [*cxx, *_flags(name), str(_HERE / f"{name}.cpp"), "-o", str(output)]
    environment = os.environ | {"TMPDIR": str(workplace)}  # a killed compiler leaves files there
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", env=environment)
    return output.read_bytes()


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines()
        line = next((line for line in lines if re.search("error:|failed", line)), lines[-1] if lines else "")
        return f"{error.cmd[0]} ended with status {error.returncode}: {line.strip()}"
    return str(error)


def _cache_folder() -> Path | None:
    """Returns where to keep libraries; None, with a warning, where another user could put code there."""
    folder = None
    try:
        folder = Path(os.environ.get("SMET_COMPILE_CACHE") or Path.home() / ".cache" / "smet_compile")
        return trusted_folder(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        _warn_of_compiling_again(folder or "~/.cache/smet_compile", str(error))
        return None


def _warn_of_compiling_again(folder: Path | str, reason: str) -> None:
    warn_once(
        f"smet_compile: compiled kernels cannot be kept in {folder}: {reason}. Every process compiles them anew; set "
        "SMET_COMPILE_CACHE to a folder that you can write to, and that nobody else can write to or replace",
        key=f"cache {folder}",
    )


def _temporary_folder() -> Path:
    """Returns the folder for temporary files, or ``/tmp`` where another user could change what lies there."""
    try:
        return trusted_folder(Path(tempfile.gettempdir()))
    except OSError:
        return trusted_folder(Path("/tmp"))


def _processor() -> str:
    """Returns a text that changes with the processor, as the code that ``-march=native`` makes does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def read_entry(entry: Path) -> bytes | None:
    """Returns the code that ``entry`` keeps; None where it is missing, damaged, or another user could have written it.

    The entry lies in a trusted folder. It is opened only once, so the content that is checked is the one returned.
    """
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # does not wait for a pipe
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


def write_entry(entry: Path, code: bytes, workplace: Path) -> None:
    """Writes ``code`` to ``workplace``, a folder in the same file system, and then moves it to ``entry``.

    Raises OSError where it cannot be kept; the entry is then as it was.
    """
    new = workplace / "whole"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # no group may write, whatever the umask
    with open(descriptor, "wb") as file:
        file.write(code + _digest(entry, code))
        file.flush()
        os.fsync(descriptor)
    _sync(workplace)
    new.replace(entry)
    _sync(entry.parent)


@contextlib.contextmanager
def new_workplace(folder: Path) -> Iterator[Path]:
    """Makes a folder in ``folder`` for this user alone, and removes it and those that killed processes left."""
    for old in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_abandoned(old.lstat()):
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _is_abandoned(status: os.stat_result) -> bool:
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_ours and time.time() - status.st_mtime > _ABANDONED_AFTER_S


def _digest(entry: Path, code: bytes) -> bytes:
    return hashlib.sha256(entry.name.encode() + b"\0" + code).digest()


def _sync(folder: Path) -> None:
    """Makes the names in ``folder`` survive a power loss, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trusted_folder(path: Path) -> Path:
    """Returns the folder at ``path`` without symbolic links, and makes it and its parents where they are missing.

    Every folder and link on the way must belong to root or this user. Nobody else may write to a folder, unless it is
    sticky as ``/tmp`` is: there others cannot replace the next component, which is checked in its turn. So nobody else
    can put another folder there later. Raises PermissionError where another user can, and OSError where the folder is
    missing and cannot be made.
    """
    _is_link(_ROOT)
    place, num_links = _ROOT, 0
    parts = [*reversed((Path.cwd() / path).parts[1:])]
    while parts:
        part = parts.pop()
        if part == "..":
            place = place.parent
            continue
        following = place / part
        if not os.path.lexists(following):
            with contextlib.suppress(FileExistsError):  # another process makes it too
                following.mkdir(0o700)
        if not _is_link(following):
            place = following
            continue
        num_links += 1
        if num_links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(following))
        place = _ROOT if target.is_absolute() else place
        parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return place


def is_trusted(status: os.stat_result) -> bool:
    """Tells whether only root and this user can change a file."""
    return status.st_uid in _owners() and not _others_write(status)


def _is_link(path: Path) -> bool:
    """Tells whether ``path`` is a link. Raises OSError where it is neither a link nor a folder to be trusted."""
    status = path.lstat()
    if status.st_uid not in _owners():
        raise PermissionError(f"{path} belongs to user {status.st_uid}, who can change what lies there")
    if stat.S_ISLNK(status.st_mode):
        return True
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if _others_write(status) and not status.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionError(f"other users may write to {path} (mode {mode:o}), which chmod go-w ends")
    return False


def _owners() -> set[int]:
    """Returns the ids of root, of this user and of the owner of ``/``: root, by another id in some containers."""
    return {0, os.geteuid(), _ROOT.stat().st_uid}


def _others_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private(status.st_gid)


def _is_private(group_id: int) -> bool:
    """Tells whether this user is the only member of a group, as is common where the umask is 002 by default."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(group_id)
    except KeyError:
        return False
    if group_id == 0 or group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
        return False
    return all(other.pw_uid == user.pw_uid for other in pwd.getpwall() if other.pw_gid == group_id)
