"""Compiles the C++ of this folder for the processor at hand, once, and loads it.

A compiler (``CXX``, else g++ or clang++) is needed at run time, as torch.compile needs one; where there is none, plain
torch computes instead. What was compiled is kept in ``SMET_COMPILE_CACHE``, else ``~/.cache/smet_compile``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_MORE_FLAGS = {"adamw": ("-ffp-contract=off",)}  # rounded as plain torch rounds, bit for bit


def compiler() -> str | None:
    """The C++ compiler's path; None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """``name``.cpp, compiled and loaded; None, with a warning, where that cannot be done."""
    cxx = compiler()
    if cxx is None or os.name != "posix":
        return None
    try:
        return ctypes.CDLL(str(_built(name, cxx)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip().splitlines()[-1:] if isinstance(error, subprocess.CalledProcessError) else [error]
        warnings.warn(f"smet_compile: {name}.cpp did not compile ({cxx}: {said}); plain torch is used", stacklevel=2)
        return None


def _built(name: str, cxx: str) -> Path:
    flags = (*_FLAGS, *_MORE_FLAGS.get(name, ()))
    sources = [_HERE / "vectors.h", _HERE / f"{name}.cpp"]
    key = hashlib.sha256(repr((cxx, flags, _processor())).encode())
    for source in sources:
        key.update(source.read_bytes())
    target = _folder() / f"{name}-{key.hexdigest()[:20]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # several processes may compile at a time
            made = Path(folder) / target.name
            command = [cxx, *flags, str(sources[-1]), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(target)
    return target


def _folder() -> Path:
    """Where compiled libraries are kept; one that ends with the process where no other can be written."""
    wanted = Path(os.environ.get("SMET_COMPILE_CACHE") or Path.home() / ".cache" / "smet_compile")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary_folder()
    return wanted if os.access(wanted, os.W_OK) else _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="smet_compile_")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
