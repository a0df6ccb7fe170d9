"""Tensors in a safetensors file, read and written through one descriptor, one tensor at a time.

The format: eight bytes with the length of a JSON header, the header (name → dtype, shape and place), the data. A file
is written here rather than by ``safetensors``, which first collects all bytes in memory and names its own temporary
file; it is read here since a mapped page changes with the file. ``safetensors.safe_open`` reads what is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smet_compile.runtime.tree import as_bytes

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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_METADATA = "__metadata__"
_AT_ONCE = 1 << 26


def write_tensors(file: int, tensors: dict[str, Tensor], metadata: Callable[[], dict[str, str]], see: Any) -> None:
    """Writes ``tensors`` to the open ``file``, each brought to the CPU for as long as it is written.

    Args:
        metadata: makes the strings in the header, called after all data was seen. As long as those it made before.
        see: called with each name, tensor on the CPU and its bytes, in the order of the names.
    """
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # so data is aligned
        places[name] = [end, end + tensors[name].numel() * tensors[name].dtype.itemsize]
        end = places[name][1]

    def header() -> bytes:
        entries: dict[str, Any] = {_METADATA: metadata()}
        for name, place in places.items():
            tensor = tensors[name]
            entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        text = json.dumps(entries, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    start = 8 + len(header())
    for name in sorted(tensors):
        tensor = tensors[name].resolve_conj().resolve_neg().cpu().contiguous()
        data = as_bytes(tensor)
        see(name, tensor, data)
        _write_all(file, data, start + places[name][0])
    text = header()
    assert 8 + len(text) == start
    _write_all(file, memoryview(len(text).to_bytes(8, "little") + text), 0)


def read_tensors(file: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads the metadata and all tensors of the open ``file`` into memory of their own.

    Raises ValueError where the file is not whole or not of this format, and OSError where it cannot be read.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(_read_all(file, bytearray(8), 0, size), "little")
    if length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"expected a header within the {size} bytes of the file, got one of {length} bytes")
    header = json.loads(bytes(_read_all(file, bytearray(length), 8, size)), object_pairs_hook=unique)
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
        _read_all(file, data, 8 + length + start, size)
        if dtype == torch.bool and bool((tensors[name].view(torch.uint8) > 1).any()):
            raise ValueError(f"{name}: expected bytes of 0 and 1 for bool, got others")
    return metadata, tensors


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of what JSON calls an object. Raises ValueError for a key that is there twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("expected each key once, got one twice")
    return made


_Place = tuple[torch.dtype, list[int], int, int]


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
    """Every byte of the data belongs to one tensor."""
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
        done += os.pwrite(file, data[done : done + _AT_ONCE], offset + done)


def _read_all(file: int, into: Any, offset: int, size: int) -> Any:
    view, done = memoryview(into), 0
    while done < len(view):
        count = os.preadv(file, [view[done : done + _AT_ONCE]], offset + done)
        if count == 0:
            raise ValueError(f"expected {size} bytes, got {offset + done}: the file was cut")
        done += count
    return into
