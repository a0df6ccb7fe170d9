"""Provides the text: the standard library's own source, all Python source of the environment, or a folder of text."""

from __future__ import annotations

import gzip
import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy
import torch

from benchmarks.studies.byte_pairs import BYTES, ByBytes, ByPairs
from smet_compile.pretrain.corpus import stdlib_paths
from smet_compile.pretrain.data import HELD_OUT_FRACTION, as_windows, read_tokens
from smet_compile.pretrain.tokenizer import open_tokenizer

STDLIB, ENVIRONMENT = "stdlib", "environment"
_INSTALLED = {"site-packages", "dist-packages"}
_PACKED = {".gz", ".dz"}
_END = b"\0"


@dataclass(frozen=True)
class Source:
    """Says what was read: a name, the number of bytes, and the start of their SHA-256."""

    name: str
    num_bytes: int
    sha256: str


def python_paths() -> list[Path]:
    """Returns all Python files of the environment: the standard library with its tests, and installed packages."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = [path for path in _files(stdlib, "*.py") if not _INSTALLED & set(path.relative_to(stdlib).parts)]
    packages = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    return found + [path for root in packages for path in _files(root, "*.py")]


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def _documents(paths: list[Path]) -> Iterator[bytes]:
    """Yields the texts in a mixed order. It leaves out repeated files and those that are no text in UTF-8."""
    seen = set()
    for path in random.Random(0).sample(paths, len(paths)):
        content = path.read_bytes()
        if path.suffix in _PACKED:
            content = gzip.decompress(content)
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen and _END not in content and _is_utf8(content):
            seen.add(digest)
            yield content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read(text: str) -> numpy.ndarray:
    """Returns the bytes of all documents, a zero after each, (T,) uint8."""
    if text == STDLIB:
        return read_tokens(stdlib_paths(), open_tokenizer("bytes"))
    if text != ENVIRONMENT and not Path(text).is_dir():
        raise ValueError(
            f"text: expected {STDLIB!r}, {ENVIRONMENT!r} or a folder, got {text!r}; check the path, or make the folder "
            "by `python -m benchmarks.studies.debian_text FOLDER`"
        )
    paths = python_paths() if text == ENVIRONMENT else _files(Path(text), "*")
    joined = b"".join(document + _END for document in _documents(paths))
    if not joined:
        raise ValueError(f"text: expected a folder with text in UTF-8, got {text!r} without; add files")
    return numpy.frombuffer(joined, numpy.uint8)


@dataclass(frozen=True)
class _Parts:
    """Holds the tokens to train on and those held out, the bytes of every token, and what was read."""

    train: numpy.ndarray
    held_out: numpy.ndarray
    tokens: ByBytes | ByPairs
    source: Source
    bytes_per_token: float


@lru_cache(maxsize=2)
def _parts(text: str, vocabulary: int) -> _Parts:
    content = _read(text)
    source = Source(text, len(content), hashlib.sha256(content.data).hexdigest()[:16])
    cut = int(len(content) * (1 - HELD_OUT_FRACTION))
    tokens = ByBytes() if vocabulary == BYTES else ByPairs(content[:cut], vocabulary)
    train, held_out = tokens.encode(content[:cut]), tokens.encode(content[cut:])
    return _Parts(train, held_out, tokens, source, (len(content) - cut) / len(held_out))


class Corpus:
    """Holds windows of ``sequence`` tokens: those to train on, in an order that the seed decides, and those held out.

    ``text`` is "stdlib", "environment" or a folder. Tokens are bytes, or with a larger ``vocabulary`` byte pairs, which
    are learnt from the text to train on.
    """

    def __init__(self, sequence: int, seed: int, text: str = STDLIB, vocabulary: int = BYTES) -> None:
        parts = _parts(text, vocabulary)
        self.source, self.bytes_per_token = parts.source, parts.bytes_per_token
        self.pieces: tuple[bytes, ...] = parts.tokens.pieces
        self._train = as_windows(parts.train, sequence)
        self._held_out = as_windows(parts.held_out, sequence)
        if not len(self._train) or not len(self._held_out):
            raise ValueError(
                f"text: expected a window of {sequence} tokens to train on and one held out, got {parts.source}; "
                "take more text, or a shorter sequence"
            )
        self._order = numpy.random.default_rng(seed).permutation(len(self._train))

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Returns the windows (size, sequence) int64 of step ``step``, the same for every method."""
        rows = self._order[numpy.arange(step * size, (step + 1) * size) % len(self._order)]
        return torch.from_numpy(self._train[rows].astype(numpy.int64))

    def held_out(self, count: int) -> torch.Tensor:
        """Returns windows (count, sequence) int64, evenly spaced over the held-out text, the same for every seed."""
        spaced = numpy.linspace(0, len(self._held_out) - 1, count).astype(int)
        return torch.from_numpy(self._held_out[spaced].astype(numpy.int64))

    def all_held_out(self) -> torch.Tensor:
        """Returns all held-out windows (W, sequence), in the type of the tokens."""
        return torch.from_numpy(self._held_out.astype(numpy.int32))

    def describe(self) -> dict:
        """Returns what a record says of the text."""
        return asdict(self.source) | {"bytes_per_token": round(self.bytes_per_token, 4)}
