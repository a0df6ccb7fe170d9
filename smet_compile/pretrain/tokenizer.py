"""Turns text into token numbers and back: bytes, or a Hugging Face tokenizer from a file."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy

from smet_compile.presets import require

END_OF_TEXT = "<|end|>"


class Tokenizer(Protocol):
    """Turns text into token numbers and back; `encode` ends each document with the token `end`, if there is one."""

    vocab_size: int
    end: int | None

    def encode(self, text: str) -> numpy.ndarray:
        """Returns the tokens of one document, (T,), in the smallest unsigned type that holds the vocabulary."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of some tokens; characters that are cut become U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the tokenizer so that `AutoTokenizer.from_pretrained(folder)` loads it."""
        ...


class ByteTokenizer:
    """Takes UTF-8 bytes as tokens; documents end in a zero byte, which text does not contain."""

    vocab_size = 256
    end: int | None = 0

    def encode(self, text: str) -> numpy.ndarray:
        """Returns the bytes of `text` and a closing zero, (T,) uint8."""
        return numpy.frombuffer(text.encode(errors="replace") + b"\0", dtype=numpy.uint8)

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of some bytes."""
        return bytes(token for token in tokens if token).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Writes a byte-level tokenizer without merges, in which a byte has its own number."""
        transformers, tokenizers = require("transformers"), require("tokenizers")
        vocabulary = {letter: byte for byte, letter in enumerate(_letters_of_bytes()) if byte} | {END_OF_TEXT: 0}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT)
        wrapped.save_pretrained(str(folder))


def _letters_of_bytes() -> list[str]:
    """Returns the letter that a byte-level tokenizer writes for each byte: printable ones stand for themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class FileTokenizer:
    """Reads a Hugging Face tokenizer from a folder or a `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = _load_tokenizer(path)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # numbers may leave some out
        if not self.vocab_size:
            raise ValueError(
                f"--tokenizer: expected a tokenizer with a vocabulary in {path}, got an empty one; train it first"
            )
        self._dtype = numpy.min_scalar_type(self.vocab_size - 1)
        self.end: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str) -> numpy.ndarray:
        """Returns the tokens of `text` and the tokenizer's end-of-text token where it has one, (T,)."""
        try:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:
            raise ValueError(
                f"--tokenizer: expected a tokenizer that takes any text, got {error}; give it an unknown token"
            ) from error
        return numpy.array(tokens if self.end is None else [*tokens, self.end], dtype=self._dtype)

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of some tokens, without special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Writes the tokenizer."""
        self._tokenizer.save_pretrained(str(folder))


def _load_tokenizer(path: Path) -> Any:
    transformers = require("transformers")
    try:
        if path.is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"--tokenizer: expected a Hugging Face tokenizer in {path}, got {error}; "
            "pass its folder or its tokenizer.json"
        ) from error


def open_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called `name`: "bytes", or a path; a ValueError if there is nothing at the path."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if not os.path.exists(path):
        raise ValueError(f"--tokenizer: expected bytes or an existing path, got {name!r}; check the path")
    return FileTokenizer(path)
