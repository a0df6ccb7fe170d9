"""One checkpoint, one file: safetensors, the JSON as a tensor of bytes, a checksum of everything in the header.

Written beside its place and renamed, so that a path holds a whole checkpoint or the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smet_compile.runtime.tree import Flattener, as_bytes, unflatten

FORMAT_VERSION = 1
_KEY = "smet_compile"
_JSON = "json"


def write(path: str | os.PathLike[str], tree: dict[str, Any]) -> None:
    """Writes a tree of JSON values and tensors. Raises ValueError where it cannot; the old file then stands."""
    path = Path(path)
    flattener = Flattener()
    body = json.dumps(flattener.flatten(tree, "checkpoint")).encode()
    tensors = {name: tensor.cpu() for name, tensor in flattener.tensors.items()}
    tensors[_JSON] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    header = json.dumps({"version": FORMAT_VERSION, "sha256": _checksum(FORMAT_VERSION, tensors)})
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), partial, {_KEY: header})
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        kept = "the checkpoint saved before is whole" if path.exists() else "nothing was saved"
        raise ValueError(f"{path}: could not save the checkpoint ({error}); {kept}; free some space") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``write`` wrote, tensors on the CPU. Raises ValueError for a file that is not whole or not ours."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, found none")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            names = list(file.keys())
            if header is None:
                raise ValueError(f"{path}: expected a checkpoint of smet_compile, got another safetensors file")
            if header["version"] > FORMAT_VERSION:
                raise ValueError(
                    f"{path}: expected a checkpoint of format version {FORMAT_VERSION} or older, got "
                    f"{header['version']}; upgrade smet_compile"
                )
            tensors = {name: file.get_tensor(name) for name in names}
        if header["sha256"] != _checksum(header["version"], tensors):
            raise ValueError(f"{path}: the checkpoint was altered: its checksum does not match; use another one")
        body = json.loads(bytes(as_bytes(tensors.pop(_JSON))))
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error}); use another one") from error
    tree: dict[str, Any] = unflatten(body, tensors)
    return tree


def _checksum(version: int, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{version}".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(as_bytes(tensors[name]))
    return digest.hexdigest()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share a storage are copied: the format wants them apart."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def _flush(path: Path) -> None:
    """Makes sure that a file, or a directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
