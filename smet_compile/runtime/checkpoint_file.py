"""One checkpoint, one file: safetensors, the JSON as a tensor of bytes, a checksum of everything in the header.

A path holds a whole checkpoint or the one before. What is read is in memory of its own: the file may change after.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smet_compile.runtime.atomic_file import whole_file
from smet_compile.runtime.tensor_file import DTYPES, read_tensors, unique, write_tensors
from smet_compile.runtime.tree import Flattener, as_bytes, unflatten

FORMAT_VERSION = 1
_KEY = "smet_compile"
_JSON = "json"


def write(path: str | os.PathLike[str], tree: dict[str, Any]) -> None:
    """Writes a tree of JSON values and tensors. Raises ValueError where it cannot; the old file then stands."""
    path = Path(path)
    flattener = Flattener(frozenset(DTYPES.values()))
    body = json.dumps(flattener.flatten(tree, "checkpoint")).encode()
    tensors = flattener.tensors | {_JSON: torch.frombuffer(bytearray(body), dtype=torch.uint8)}
    digest = _Digest(FORMAT_VERSION)
    try:
        with whole_file(path) as file:
            write_tensors(file, tensors, lambda: {_KEY: json.dumps(digest.header())}, digest.see)
    except OSError as error:
        kept = "the checkpoint saved before is whole" if path.exists() else "nothing was saved"
        raise ValueError(f"{path}: could not save the checkpoint ({error}); {kept}; free some space") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``write`` wrote, tensors on the CPU. Raises ValueError for a file that is not whole or not ours."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, found none")
    try:
        metadata, tensors = _read_once(path)
        header = json.loads(metadata.get(_KEY, "null"), object_pairs_hook=unique)
    except (OSError, ValueError, RuntimeError) as error:  # among them JSON and its depth, UTF-8, torch's own
        raise ValueError(f"{path}: not a whole checkpoint ({error}); use another one") from error
    if header is None:
        raise ValueError(f"{path}: expected a checkpoint of smet_compile, got another safetensors file")
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected a checkpoint of format version {FORMAT_VERSION} or older, got {version}; upgrade "
            "smet_compile"
        )
    if type(version) is not int or version < 1 or header != {"version": version, "sha256": _checksum(version, tensors)}:
        raise ValueError(f"{path}: the checkpoint was altered: its checksum does not match; use another one")
    if _JSON not in tensors:
        raise ValueError(f"{path}: not a whole checkpoint (it has no {_JSON!r}); use another one")
    try:
        body = json.loads(bytes(as_bytes(tensors.pop(_JSON))), object_pairs_hook=unique)
        tree: dict[str, Any] = unflatten(body, tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error}); use another one") from error
    return tree


def _read_once(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Everything comes from one descriptor: another file may be renamed to ``path`` meanwhile."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("expected a regular file")
        return read_tensors(file)
    finally:
        os.close(file)


class _Digest:
    """The checksum of all tensors, seen one by one in the order of their names."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._hash = hashlib.sha256(f"{version}".encode())

    def see(self, name: str, tensor: Tensor, data: memoryview) -> None:
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._hash.update(data)

    def header(self) -> dict[str, Any]:
        return {"version": self._version, "sha256": self._hash.hexdigest()}


def _checksum(version: int, tensors: dict[str, Tensor]) -> str:
    digest = _Digest(version)
    for name in sorted(tensors):
        digest.see(name, tensors[name], as_bytes(tensors[name]))
    checksum: str = digest.header()["sha256"]
    return checksum
