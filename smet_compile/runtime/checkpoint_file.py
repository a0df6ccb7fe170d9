"""Writes and reads one checkpoint as one file, whole or not at all.

The format is safetensors: eight bytes with the length of a JSON header, the header (name → dtype, shape and place),
the data. Everything that is no tensor is JSON, stored as a tensor of bytes. The header holds a checksum of all data.

A file is written here rather than by ``safetensors``, which first collects all bytes in memory and names its own
temporary file. It is read here since a mapped page changes with the file. ``safetensors.safe_open`` reads it too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smet_compile.runtime.tree import Flattener, as_bytes, unflatten
from smet_compile.shards import Ranks, make_whole

FORMAT_VERSION = 1
_KEY = "smet_compile"
_JSON = "json"
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000
_CHUNK_BYTES = 1 << 26
_TEMPORARY = ".tmp-smet-"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The names of safetensors for the dtypes that it can hold."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_Place = tuple[torch.dtype, list[int], int, int]
"""dtype, shape, first byte and end of a tensor in the data."""


def write(path: str | os.PathLike[str], tree: dict[str, Any]) -> None:
    """Writes a tree of JSON values and tensors.

    Where tensors are sharded, all ranks call it, and the first of them writes; each sharded tensor is whole in memory
    for as long as it is written. Raises ValueError where it cannot; the file that was there before then stands.
    """
    flattener = make_flattener()
    write_flat(path, flattener.flatten(tree, "checkpoint"), flattener)


def make_flattener() -> Flattener:
    """Returns a flattener for the dtypes that a file can hold."""
    return Flattener(frozenset(DTYPES.values()))


def write_flat(path: str | os.PathLike[str], flat: Any, flattener: Flattener, content: str = "checkpoint") -> None:
    """Writes the JSON ``flat``, and the tensors that ``flattener`` collected for it under their own names.

    Args:
        content: the word for the file in errors.
    """
    path = Path(path)
    if _JSON in flattener.tensors:
        raise ValueError(f"{_JSON}: expected a tensor of another name, got one of this; rename it in the model")
    body = json.dumps(flat).encode()
    tensors = flattener.tensors | {_JSON: torch.frombuffer(bytearray(body), dtype=torch.uint8)}
    ranks = Ranks.of_tensors(tensors.values())
    whole = ((name, flattener.orders.get(name, _as_it_is)(make_whole(tensors[name]))) for name in sorted(tensors))
    error: Exception | None = None
    try:
        if ranks.is_first:
            with _whole_file(path) as file:
                _write_tensors(file, tensors, whole)
    except OSError as found:
        error = found
    for _ in whole:  # other ranks send their shards also where this one does not write
        pass
    if not ranks.least([error is None], torch.device("cpu"))[0]:
        kept = f"the {content} saved before is whole" if path.exists() else "nothing was saved"
        reason = error or "another rank writes it"
        raise ValueError(f"{path}: could not save the {content} ({reason}); {kept}; free some space") from error


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what ``write`` wrote, with tensors on the CPU in memory of their own.

    Raises ValueError for a file that is not whole or not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, found none")
    tree: dict[str, Any] = read_tree(path)
    return tree


def to_bytes(tree: dict[str, Any]) -> bytes:
    """Returns the file that ``write`` makes of a tree without shards: the same bytes for the same tree."""
    flattener = make_flattener()
    body = json.dumps(flattener.flatten(tree, "state")).encode()
    tensors = flattener.tensors | {_JSON: torch.frombuffer(bytearray(body), dtype=torch.uint8)}
    with tempfile.TemporaryFile() as file:
        _write_tensors(file.fileno(), tensors, sorted(tensors.items()))
        return file.read()


def from_bytes(name: str, data: bytes) -> Any:
    """Returns the tree of ``to_bytes``. Raises ValueError, which names ``name``, for other bytes."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return _tree_of(name, "state", lambda: _read_tensors(file.fileno()))


def read_tree(path: Path, content: str = "checkpoint") -> Any:
    """Returns the JSON of a file with the tensors that it names in it, as ``read`` does."""
    return _tree_of(str(path), content, lambda: _read_once(path))


def _tree_of(path: str, content: str, read_tensors: Callable[[], tuple[dict[str, str], dict[str, Tensor]]]) -> Any:
    try:
        metadata, tensors = read_tensors()
        header = json.loads(metadata.get(_KEY, "null"), object_pairs_hook=_unique)
    except (OSError, ValueError, RuntimeError) as error:  # errors of JSON and its depth, of UTF-8 and of torch
        raise ValueError(f"{path}: not a whole {content} ({error}); use another one") from error
    if header is None:
        raise ValueError(f"{path}: expected a {content} of smet_compile, got another safetensors file")
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected a {content} of format version {FORMAT_VERSION} or older, got {version}; upgrade "
            "smet_compile"
        )
    if type(version) is not int or version < 1 or header != {"version": version, "sha256": _checksum(version, tensors)}:
        raise ValueError(f"{path}: the {content} was altered: its checksum does not match; use another one")
    if _JSON not in tensors:
        raise ValueError(f"{path}: not a whole {content} (it has no {_JSON!r}); use another one")
    try:
        body = json.loads(bytes(as_bytes(tensors.pop(_JSON))), object_pairs_hook=_unique)
        return unflatten(body, tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole {content} ({error}); use another one") from error


def _read_once(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads everything from one descriptor: another file may be renamed to ``path`` meanwhile."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("expected a regular file")
        return _read_tensors(file)
    finally:
        os.close(file)


class _Digest:
    """Makes the checksum of all tensors, which are added one by one in the order of their names."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._hash = hashlib.sha256(f"{version}".encode())

    def add(self, name: str, tensor: Tensor, data: memoryview) -> None:
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._hash.update(data)

    def hex(self) -> str:
        return self._hash.hexdigest()

    def metadata(self) -> dict[str, str]:
        """Returns the strings in the header; they are as long before the first tensor as after the last."""
        return {_KEY: json.dumps({"version": self._version, "sha256": self.hex()})}


def _checksum(version: int, tensors: dict[str, Tensor]) -> str:
    digest = _Digest(version)
    for name in sorted(tensors):
        digest.add(name, tensors[name], as_bytes(tensors[name]))
    return digest.hex()


def _write_tensors(file: int, tensors: dict[str, Tensor], whole: Iterable[tuple[str, Tensor]]) -> None:
    """Writes ``tensors`` to the open ``file``, each brought to the CPU for as long as it is written.

    ``whole`` yields them by name, none of them a shard.
    """
    digest = _Digest(FORMAT_VERSION)
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # so data is aligned
        places[name] = [end, end + tensors[name].numel() * tensors[name].dtype.itemsize]
        end = places[name][1]

    def header() -> bytes:
        entries: dict[str, Any] = {_METADATA: digest.metadata()}
        for name, place in places.items():
            tensor = tensors[name]
            entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        text = json.dumps(entries, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    start = 8 + len(header())
    for name, found in whole:
        tensor = found.resolve_conj().resolve_neg().cpu().contiguous()
        data = as_bytes(tensor)
        digest.add(name, tensor, data)
        _write_all(file, data, start + places[name][0])
    text = header()
    assert 8 + len(text) == start
    _write_all(file, memoryview(len(text).to_bytes(8, "little") + text), 0)


def _read_tensors(file: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads the metadata and all tensors of the open ``file``.

    Raises ValueError where the file is not whole or not safetensors, and OSError where it cannot be read.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(_read_all(file, bytearray(8), 0), "little")
    if length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"expected a header within the {size} bytes of the file, got one of {length} bytes")
    header = json.loads(bytes(_read_all(file, bytearray(length), 8)), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("expected a header that is a JSON object, got another")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("expected strings as metadata, got others")
    places = {name: _place(name, entry) for name, entry in header.items()}
    _check_seamless(places, size - 8 - length)
    tensors = {}
    for name, (dtype, shape, start, end) in places.items():
        tensors[name] = torch.empty(shape, dtype=dtype)
        data = as_bytes(tensors[name])
        assert len(data) == end - start
        _read_all(file, data, 8 + length + start)
        if dtype == torch.bool and bool((tensors[name].view(torch.uint8) > 1).any()):
            raise ValueError(f"{name}: expected bytes of 0 and 1 for bool, got others")
    return metadata, tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of a JSON object. Raises ValueError for a key that is there twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("expected each key once, got one twice")
    return made


def _place(name: str, entry: Any) -> _Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets in the header, got {entry!r:.80}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)} as dtype, got {dtype!r:.80}")
    for numbers in (shape, place):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name}: expected a list of sizes, got {numbers!r:.80}")
    if len(place) != 2 or place[1] - place[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name}: expected as many bytes as {dtype} of shape {shape} takes, got {place}")
    return DTYPES[dtype], shape, place[0], place[1]


def _check_seamless(places: dict[str, _Place], num_bytes: int) -> None:
    """Checks that every byte of the data belongs to one tensor."""
    end = 0
    for name, (_, _, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(f"{name}: expected its data at byte {end}, got {start}")
        end = stop
    if end != num_bytes:
        raise ValueError(f"expected {end} bytes of data, got {num_bytes}: the file was cut or added to")


def _write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + _CHUNK_BYTES], offset + done)


def _read_all(file: int, into: Any, offset: int) -> Any:
    view, done = memoryview(into), 0
    while done < len(view):
        count = os.preadv(file, [view[done : done + _CHUNK_BYTES]], offset + done)
        if count == 0:
            raise ValueError(f"expected {offset + len(view)} bytes or more, got {offset + done}: the file was cut")
        done += count
    return into


@contextmanager
def _whole_file(path: Path) -> Iterator[int]:
    """Yields the descriptor of a new file, which takes the place of ``path`` when the block ends.

    The new file has a name of its own beside ``path`` and is renamed once it is on disk. If the block raises, it is
    removed and ``path`` stands as it was. Several processes may write to one path at a time; the last file stands.

    Whoever writes holds a lock on the new file. One that nobody has locked was left by a process that was killed; the
    next one to write to the same path removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _create_locked(path)
    try:
        yield file
        os.fsync(file)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    _remove_leftovers(path)


def _flush_folder(path: Path) -> None:
    """Makes sure that the entries of a folder are on disk."""
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _prefix(path: Path) -> str:
    """Returns the start of the names of files that become ``path``; it is short, however long its name is."""
    return f"{_TEMPORARY}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _create_locked(path: Path) -> tuple[Path, int]:
    """Creates and locks a file; tries again where another process took it for a leftover before it was locked."""
    while True:
        temporary = path.with_name(_prefix(path) + secrets.token_hex(8))
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can take it for a leftover
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink > 0:
            return temporary, file
        os.close(file)


def _remove_leftovers(path: Path) -> None:
    """Removes the files that killed processes left when they wrote to ``path``; failing to is no harm."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(_prefix(path)):
                _remove_unlocked(path.with_name(name))


def _remove_unlocked(leftover: Path) -> None:
    with contextlib.suppress(OSError):
        file = os.open(leftover, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
        finally:
            os.close(file)
