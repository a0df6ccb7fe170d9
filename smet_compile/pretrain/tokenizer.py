"""Text to token numbers: bytes as they are, or a Hugging Face tokenizer from disk."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy

from smet_compile.pretrain.extras import require


class Tokenizer(Protocol):
    """What the data needs of a tokenizer: `encode` ends each document with a separator token."""

    vocab_size: int
    bytes_are_tokens: bool

    def encode(self, text: str) -> numpy.ndarray:
        """The tokens of one document, (T,), in the smallest unsigned type that holds the vocabulary."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens; documents end in a zero byte, which text does not contain."""

    vocab_size = 256
    bytes_are_tokens = True

    def encode(self, text: str) -> numpy.ndarray:
        """The bytes of `text` and a closing zero, (T,) uint8."""
        return numpy.frombuffer(text.encode(errors="replace") + b"\0", dtype=numpy.uint8)


class FileTokenizer:
    """A Hugging Face tokenizer read from a folder or a `tokenizer.json`."""

    bytes_are_tokens = False

    def __init__(self, path: Path) -> None:
        self._tokenizer = _load(path)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # numbers may leave some out
        if not self.vocab_size:
            raise ValueError(f"--tokenizer: expected a tokenizer with a vocabulary in {path}, got an empty one")
        self._dtype = numpy.min_scalar_type(self.vocab_size - 1)
        self._end = self._tokenizer.eos_token_id

    def encode(self, text: str) -> numpy.ndarray:
        """The tokens of `text` and the tokenizer's end-of-text token where it has one, (T,)."""
        try:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:
            raise ValueError(f"--tokenizer: expected a tokenizer that takes any text, got {error}") from error
        return numpy.array(tokens if self._end is None else [*tokens, self._end], dtype=self._dtype)


def _load(path: Path) -> Any:
    transformers = require("transformers")
    try:
        if path.is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise ValueError(f"--tokenizer: expected a Hugging Face tokenizer in {path}, got {error}") from error


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `name` stands for: "bytes", or a path; a ValueError if there is nothing at the path."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if not os.path.exists(path):
        raise ValueError(f"--tokenizer: expected bytes or an existing path, got {name!r}")
    return FileTokenizer(path)
