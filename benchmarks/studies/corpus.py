"""Provides the text: the standard library's own source as bytes, its last part held out."""

from __future__ import annotations

from functools import lru_cache

import numpy
import torch

from smet_compile.pretrain.corpus import stdlib_paths
from smet_compile.pretrain.data import HELD_OUT_FRACTION, as_windows, read_tokens
from smet_compile.pretrain.tokenizer import open_tokenizer

VOCABULARY = 256


@lru_cache(maxsize=1)
def _tokens() -> numpy.ndarray:
    return read_tokens(stdlib_paths(), open_tokenizer("bytes"))


class Corpus:
    """Holds windows of ``sequence`` bytes: those to train on, in an order that the seed decides, and those held out."""

    def __init__(self, sequence: int, seed: int) -> None:
        tokens = _tokens()
        first_held_out = int(len(tokens) * (1 - HELD_OUT_FRACTION))
        self._train = as_windows(tokens[:first_held_out], sequence)
        self._held_out = as_windows(tokens[first_held_out:], sequence)
        self._order = numpy.random.default_rng(seed).permutation(len(self._train))

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Returns the windows (size, sequence) int64 of step ``step``, the same for every method."""
        rows = self._order[numpy.arange(step * size, (step + 1) * size) % len(self._order)]
        return torch.from_numpy(self._train[rows].astype(numpy.int64))

    def held_out(self, count: int) -> torch.Tensor:
        """Returns windows (count, sequence) int64, evenly spaced over the held-out text, the same for every seed."""
        spaced = numpy.linspace(0, len(self._held_out) - 1, count).astype(int)
        return torch.from_numpy(self._held_out[spaced].astype(numpy.int64))
