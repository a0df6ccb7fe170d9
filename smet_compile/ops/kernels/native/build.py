"""Compiles the C++ of this folder for the processor at hand, once, and loads it.

A compiler (``CXX``, else g++ or clang++) is needed at run time, as torch.compile needs one; where there is none, plain
torch computes instead. What was compiled is kept in ``SMET_COMPILE_CACHE``, else ``~/.cache/smet_compile``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_MORE_FLAGS = {"adamw": ("-ffp-contract=off",)}  # rounded as plain torch rounds, bit for bit


def compiler() -> list[str] | None:
    """The command of the C++ compiler; None where there is none."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]:
        words = shlex.split(command)
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return [path, *words[1:]]
    return None


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """``name``.cpp, compiled and loaded; None where that cannot be done, with a warning unless nothing is installed."""
    cxx = compiler()
    if cxx is None or os.name != "posix":
        if os.environ.get("CXX"):
            _warn(f"CXX={os.environ['CXX']} was not found")
        return None
    try:
        return _loaded(_kept(name, cxx), name, cxx)
    except subprocess.CalledProcessError as error:
        _warn(f"{name}.cpp did not compile ({cxx[0]}: {' '.join(error.stderr.strip().splitlines()[-1:])})")
    except OSError as error:
        _warn(f"{name}.cpp could not be compiled or loaded ({error})")
    return None


def _warn(what: str) -> None:
    warnings.warn(f"smet_compile: {what}; plain torch is used", stacklevel=3)


def _kept(name: str, cxx: list[str]) -> Path:
    """Where the library is kept, under a name that says all that it was made from."""
    sources = [_HERE / "vectors.h", _HERE / f"{name}.cpp"]
    made_by = Path(cxx[0]).resolve()
    version = made_by.stat().st_size, made_by.stat().st_mtime_ns
    key = hashlib.sha256(repr((cxx, version, platform.libc_ver(), _flags(name), _processor())).encode())
    for source in sources:
        key.update(source.read_bytes())
    return _folder() / f"{name}-{key.hexdigest()[:20]}.so"


def _flags(name: str) -> tuple[str, ...]:
    return (*_FLAGS, *_MORE_FLAGS.get(name, ()))


def _loaded(target: Path, name: str, cxx: list[str]) -> ctypes.CDLL:
    """``target``, compiled where it is not there, is not ours, or cannot be loaded."""
    if target.exists() and _is_ours(target):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    _compile(target, name, cxx)
    return ctypes.CDLL(str(target))


def _compile(target: Path, name: str, cxx: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # several processes may compile at a time
        made = Path(folder) / target.name
        command = [*cxx, *_flags(name), str(_HERE / f"{name}.cpp"), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(target)


def _folder() -> Path:
    """Where compiled libraries are kept; a new one of this process where no other can be trusted."""
    try:
        wanted = Path(os.environ.get("SMET_COMPILE_CACHE") or Path.home() / ".cache" / "smet_compile")
        wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # of a user without a home
        return _temporary_folder()
    return wanted if os.access(wanted, os.W_OK) and _is_ours(wanted) else _temporary_folder()


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put code there."""
    stat = path.stat()
    return stat.st_uid in (os.geteuid(), 0) and not stat.st_mode & 0o022


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="smet_compile_"))


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
