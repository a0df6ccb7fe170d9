"""Turns `--data` and `--tokenizer` into batches of training tokens and a held-out validation split.

Local text is a pure function from (seed, step) to a batch. A stream is read in its own order, from a position that a
checkpoint can hold.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy
import torch

from smet_compile.format.arguments import described
from smet_compile.presets import require
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.corpus import read_texts, stdlib_paths, text_paths
from smet_compile.pretrain.memory import expect_room_for_windows
from smet_compile.pretrain.tokenizer import Tokenizer

DATA_KINDS = "stdlib, text:GLOB or hf:NAME[:CONFIG]"
HELD_OUT_FRACTION = 0.05


class Source(Protocol):
    """Gives training batches by step number. `state_dict` is the part of a checkpoint that says where to go on."""

    def batch(self, step: int) -> torch.Tensor:
        """Returns the tokens of step `step` (from 0), (accumulate, batch, sequence) int64."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a position."""
        ...


@dataclass(frozen=True)
class Data:
    """Holds training batches, validation windows (W, sequence) outside of them, and a hash of a local corpus."""

    train: Source
    validation: torch.Tensor
    fingerprint: str


def open_data(config: RunConfig, tokenizer: Tokenizer) -> Data:
    """Opens the text that `config.data` names; a ValueError says what is wrong with it."""
    kind, _, rest = config.data.partition(":")
    if kind == "hf" and rest:
        return Data(*open_stream(rest, config, tokenizer), fingerprint="")
    if config.data == "stdlib":
        paths = stdlib_paths()
    elif kind == "text" and rest:
        paths = text_paths(rest)
    else:
        raise ValueError(f"--data: expected {DATA_KINDS}, got {config.data!r}; pass one of these")
    return Data(*split_tokens(read_tokens(paths, tokenizer), config))


def read_tokens(paths: Sequence[Path], tokenizer: Tokenizer) -> numpy.ndarray:
    """Returns the tokens of all files, (T,), in an order that is mixed but always the same."""
    joined, kind = bytearray(), numpy.dtype(numpy.uint8)  # grows in place, where joining parts takes twice the memory
    for text in read_texts(paths):
        tokens = tokenizer.encode(text)
        joined += tokens.data
        kind = tokens.dtype
    return numpy.frombuffer(joined, kind)


class WindowSource:
    """Gives batches of whole windows of a token array; each epoch is another permutation of all windows."""

    def __init__(self, tokens: numpy.ndarray, config: RunConfig) -> None:
        self._windows = as_windows(tokens, config.sequence)
        self._batch_shape = (config.accumulate, config.batch, config.sequence)
        self._seed = config.seed
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> numpy.ndarray:
        return numpy.random.default_rng((self._seed, epoch)).permutation(len(self._windows))

    def batch(self, step: int) -> torch.Tensor:
        """Returns the tokens of step `step`, (accumulate, batch, sequence) int64."""
        count = self._batch_shape[0] * self._batch_shape[1]
        places = (divmod(row, len(self._windows)) for row in range(step * count, (step + 1) * count))
        rows = [self._order(epoch)[position] for epoch, position in places]
        return torch.from_numpy(self._windows[rows].astype(numpy.int64)).view(self._batch_shape)

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: the step number is the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the step number is the position."""


def as_windows(tokens: numpy.ndarray, sequence: int) -> numpy.ndarray:
    """Cuts (T,) into whole windows (T // sequence, sequence)."""
    count = len(tokens) // sequence
    return tokens[: count * sequence].reshape(count, sequence)


def split_tokens(tokens: numpy.ndarray, config: RunConfig) -> tuple[WindowSource, torch.Tensor, str]:
    """Keeps the last 5% (at least one window) for validation: (training batches, validation, hash of tokens).

    The validation windows are evenly spaced over the held-out part, `eval_windows` of them at most. Raises
    ValueError where the text is too short for one window on each side.
    """
    held_out = max(int(len(tokens) * HELD_OUT_FRACTION), config.sequence)
    train, rest = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    if len(train) < config.sequence:
        raise ValueError(
            f"--sequence: expected at most {len(tokens) // 2} (half of the text: one window to train on, one "
            f"to validate on), got {config.sequence}; choose a shorter --sequence or more text"
        )
    windows = as_windows(rest, config.sequence)
    spaced = numpy.linspace(0, len(windows) - 1, min(config.eval_windows, len(windows))).astype(int)
    validation = torch.from_numpy(windows[spaced].astype(numpy.int64))
    return WindowSource(train, config), validation, hashlib.sha256(tokens.data).hexdigest()


class StreamSource:
    """Packs the documents of an `IterableDataset` into windows; starts over at the end of the stream."""

    def __init__(self, dataset: Any, tokenizer: Tokenizer, config: RunConfig) -> None:
        self._dataset, self._tokenizer, self._column = dataset, tokenizer, config.column
        self._batch_shape = (config.accumulate, config.batch, config.sequence)
        self._left = numpy.zeros(0, dtype=numpy.int64)
        self._documents = self._read()

    def _read(self) -> Iterator[numpy.ndarray]:
        for epoch in count(self._dataset.epoch):
            self._dataset.set_epoch(epoch)
            empty = True
            for text in _texts(self._dataset, self._column):
                empty = False
                yield self._tokenizer.encode(text).astype(numpy.int64)
            if empty and not len(self._left):
                raise ValueError(
                    "--data: expected a stream with documents to train on, got an empty one; "
                    "add text, or take a smaller --eval-windows"
                )

    def batch(self, step: int) -> torch.Tensor:
        """Returns the next tokens, (accumulate, batch, sequence) int64; the stream stands at `step` already."""
        wanted = int(numpy.prod(self._batch_shape))
        parts, total = [self._left], len(self._left)
        while total < wanted:
            parts.append(next(self._documents))
            total += len(parts[-1])
        tokens = numpy.concatenate(parts)
        self._left = tokens[wanted:]
        return torch.from_numpy(tokens[:wanted].copy()).view(self._batch_shape)

    def state_dict(self) -> dict[str, Any]:
        """Returns the stream's own position and the tokens that were read but not used."""
        return {"stream": self._dataset.state_dict(), "left": self._left.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        try:
            self._dataset.load_state_dict(state["stream"])
            self._dataset.set_epoch(state["stream"]["epoch"])
            self._left = numpy.array(state["left"], dtype=numpy.int64)
        except Exception as error:
            raise ValueError(f"--resume: expected a position in this run's stream, got another ({error!r}); "
                             "begin a new run with --out") from error  # fmt: skip
        self._documents = self._read()


def _texts(dataset: Any, column: str) -> Iterator[str]:
    """Yields the documents of a stream; ValueError where one cannot be read or holds no text."""
    examples = iter(dataset)
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"--data: the stream could not be read ({error}); check files and network") from error
        if column not in example:
            columns = ", ".join(map(str, example))
            raise ValueError(f"--column: expected one of {columns}, got {column}; name the one to train on")
        if not isinstance(example[column], str):
            found = described(example[column])
            raise ValueError(f"--data: expected text in the column {column}, got {found}; leave such rows out")
        yield example[column]


def open_stream(spec: str, config: RunConfig, tokenizer: Tokenizer) -> tuple[StreamSource, torch.Tensor]:
    """Opens `NAME[:CONFIG]` on the Hugging Face hub, or a local folder: (training batches, validation).

    Validation text is the start of the "validation" split, or of "train" where there is none; documents taken from
    "train" are skipped in training.
    """
    expect_room_for_windows(config)
    name, _, variant = spec.partition(":")
    splits = _load_splits(name, variant or None)
    if "train" not in splits:
        raise ValueError(
            f"--data: expected a train split in hf:{spec}, got {', '.join(splits)}; choose a data set that has one"
        )
    train, own = splits["train"], splits.get("validation")
    validation, num_documents = _read_validation(train if own is None else own, config, tokenizer)
    if own is None:
        train = train.skip(num_documents)
    return StreamSource(train, tokenizer, config), validation


def _load_splits(name: str, variant: str | None) -> dict[str, Any]:
    datasets = require("datasets", "'smet-compile[hub]'")
    try:
        with TemporaryDirectory() as cache:
            return dict(datasets.load_dataset(name, variant, streaming=True, cache_dir=cache))
    except Exception as error:
        raise ValueError(
            f"--data: hf:{name}{':' + variant if variant else ''} could not be opened ({error}); "
            "check name, config and network; stdlib and text:GLOB need no network"
        ) from error


def _read_validation(dataset: Any, config: RunConfig, tokenizer: Tokenizer) -> tuple[torch.Tensor, int]:
    wanted = config.eval_windows * config.sequence
    parts: list[numpy.ndarray] = []
    for text in _texts(dataset, config.column):
        parts.append(tokenizer.encode(text).astype(numpy.int64))
        if sum(map(len, parts)) >= wanted:
            break
    tokens = numpy.concatenate(parts) if parts else numpy.zeros(0, dtype=numpy.int64)
    if len(tokens) < config.sequence:
        raise ValueError(
            f"--sequence: expected at most {len(tokens)} (the held-out text), got {config.sequence}; "
            "choose a shorter --sequence or more text"
        )
    count = min(len(tokens) // config.sequence, config.eval_windows)
    return torch.from_numpy(tokens[: count * config.sequence]).view(count, config.sequence), len(parts)
