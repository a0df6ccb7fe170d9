"""Compiles the C++ of this folder for the processor at hand, once, and loads it.

A compiler (``CXX``, else g++ or clang++) is needed at run time, as torch.compile needs one; where there is none, plain
torch computes instead. What was compiled is kept in ``SMET_COMPILE_CACHE``, else ``~/.cache/smet_compile``; where
another user could put code there, every process compiles for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from smet_compile.ops.kernels.native import cache
from smet_compile.ops.kernels.native.trust import trusted_folder
from smet_compile.ops.torch_insides import warn_once

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_MORE_FLAGS = {"adamw": ("-ffp-contract=off",)}  # rounded as plain torch rounds, bit for bit
_loads = itertools.count()


def compiler() -> list[str] | None:
    """The command of the C++ compiler; None where there is none."""
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
    """``name``.cpp, compiled and loaded; None where that cannot be done, with a warning unless nothing is installed."""
    cxx = compiler()
    if cxx is None or os.name != "posix":
        if os.environ.get("CXX"):
            _warn_of_plain_torch(f"CXX={os.environ['CXX']} was not found")
        return None
    try:
        return _loaded(_kept(name, cxx), name, cxx)
    except subprocess.CalledProcessError as error:
        _warn_of_plain_torch(f"{name}.cpp did not compile ({_reason(error)})")
    except OSError as error:
        _warn_of_plain_torch(f"{name}.cpp could not be compiled or loaded ({error})")
    return None


def _warn_of_plain_torch(what: str) -> None:
    warn_once(f"smet_compile: {what}; plain torch is used")


def _kept(name: str, cxx: list[str]) -> Path | None:
    """Returns where to keep the library, by a name that says all that it was made from; None where nothing is kept."""
    sources = [_HERE / "vectors.h", _HERE / f"{name}.cpp"]
    made_by = Path(cxx[0]).resolve()
    version = made_by.stat().st_size, made_by.stat().st_mtime_ns
    key = hashlib.sha256(repr((cxx, version, platform.libc_ver(), _flags(name), _processor())).encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = _folder()
    return folder and folder / f"{name}-{key.hexdigest()[:20]}.so"


def _flags(name: str) -> tuple[str, ...]:
    return (*_FLAGS, *_MORE_FLAGS.get(name, ()))


def _loaded(target: Path | None, name: str, cxx: list[str]) -> ctypes.CDLL:
    """Loads ``target``, compiled anew where it is not whole or cannot be loaded."""
    code = cache.read(target) if target else None
    if code is not None:
        with contextlib.suppress(OSError):
            return _load(code, target or name)
    return _load(_compile(target, name, cxx), target or name)


def _load(code: bytes, name: Path | str) -> ctypes.CDLL:
    """Loads ``code`` from memory, which nobody else can change. ``name`` is what the library is called afterwards."""
    try:
        descriptor = os.memfd_create("smet_compile")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(code)
            # The loader returns an earlier library for a path that it knows, and a descriptor's number comes again.
            loaded = ctypes.CDLL(f"/proc/self/{'./' * next(_loads)}fd/{descriptor}")
        finally:
            os.close(descriptor)
    except (AttributeError, OSError):  # without Linux, without /proc, or where such memory may not be executed
        with cache.new_workplace(_temporary_folder()) as workplace:
            path = workplace / "loaded.so"
            path.write_bytes(code)
            loaded = ctypes.CDLL(str(path))
    loaded._name = str(name)
    return loaded


def _compile(target: Path | None, name: str, cxx: list[str]) -> bytes:
    """Compiles to ``target``; where that cannot be done, in a temporary folder that is removed."""
    if target is None:
        return _compile_elsewhere(name, cxx)
    code = None
    try:
        with cache.new_workplace(target.parent) as workplace:
            code = _run(workplace, name, cxx)
            cache.write(target, code, workplace)
    except (OSError, subprocess.CalledProcessError) as error:  # read only or full
        code = _compile_elsewhere(name, cxx) if code is None else code
        _warn_of_compiling_again(target.parent, _reason(error))
    return code


def _compile_elsewhere(name: str, cxx: list[str]) -> bytes:
    with cache.new_workplace(_temporary_folder()) as workplace:
        return _run(workplace, name, cxx)


def _run(workplace: Path, name: str, cxx: list[str]) -> bytes:
    made = workplace / f"{name}.so"
    command = [*cxx, *_flags(name), str(_HERE / f"{name}.cpp"), "-o", str(made)]
    environment = os.environ | {"TMPDIR": str(workplace)}  # where compilers leave files when they are killed
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", env=environment)
    return made.read_bytes()


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines()
        line = next((line for line in lines if re.search("error:|failed", line)), lines[-1] if lines else "")
        return f"{error.cmd[0]} ended with status {error.returncode}: {line.strip()}"
    return str(error)


def _folder() -> Path | None:
    """Returns where to keep libraries; None, with a warning, where another user could put code there."""
    wanted = None
    try:
        wanted = Path(os.environ.get("SMET_COMPILE_CACHE") or Path.home() / ".cache" / "smet_compile")
        return trusted_folder(wanted)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _warn_of_compiling_again(wanted or "~/.cache/smet_compile", str(error))
        return None


def _warn_of_compiling_again(folder: Path | str, why: str) -> None:
    warn_once(
        f"smet_compile: compiled kernels cannot be kept in {folder}: {why}. Every process compiles them anew; set "
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
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
