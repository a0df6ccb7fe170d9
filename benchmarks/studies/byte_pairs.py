"""Turns text into tokens: bytes as they are, or byte pairs that are learnt from the text itself."""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory

import numpy

from smet_compile.pretrain.tokenizer import END_OF_TEXT, Tokenizer, open_tokenizer

BYTES = 256
"""Size of the vocabulary of bytes."""

_END = b"\0"


class ByBytes:
    """Takes every byte as a token. ``pieces`` holds the bytes of every token."""

    def __init__(self) -> None:
        self.pieces = tuple(bytes([byte]) for byte in range(BYTES))

    def encode(self, content: numpy.ndarray) -> numpy.ndarray:
        return content


class ByPairs:
    """Learns ``vocabulary`` tokens from documents that end in a zero byte each. ``pieces``: the bytes of every token.

    The zero byte is the piece of the token that ends a document.
    """

    def __init__(self, content: numpy.ndarray, vocabulary: int) -> None:
        if vocabulary <= BYTES:
            raise ValueError(
                f"vocabulary: expected {BYTES}, which means bytes, or more, got {vocabulary}; take a larger one"
            )
        self._tokenizer, self.pieces = _learn(list(_texts(content)), vocabulary)

    def encode(self, content: numpy.ndarray) -> numpy.ndarray:
        """Returns the tokens of all documents, (T,)."""
        return numpy.concatenate([self._tokenizer.encode(text) for text in _texts(content)])


def _texts(content: numpy.ndarray) -> Iterator[str]:
    for document in content.tobytes().removesuffix(_END).split(_END):
        yield document.decode(errors="replace")  # the first and the last may be cut within a character


def _learn(texts: list[str], vocabulary: int) -> tuple[Tokenizer, tuple[bytes, ...]]:
    """Returns a tokenizer of byte pairs as `--tokenizer` reads it, and the bytes of every token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    if learner.get_vocab_size() != vocabulary:
        raise ValueError(
            f"vocabulary: expected at most the {learner.get_vocab_size()} tokens that the text has, got {vocabulary}; "
            "take a smaller one or more text"
        )
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    names = {token: name for name, token in learner.get_vocab().items()}
    pieces = (
        _END if names[token] == END_OF_TEXT else bytes(byte_of[letter] for letter in names[token])
        for token in range(vocabulary)
    )
    with TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=learner, eos_token=END_OF_TEXT).save_pretrained(folder)
        return open_tokenizer(folder), tuple(pieces)
