"""Text streamed by `datasets`: batches in its order, from a position that a checkpoint can hold."""

from collections.abc import Iterator
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch

from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.extras import require
from smet_compile.pretrain.memory_limit import expect_room_for_windows
from smet_compile.pretrain.option_values import shown
from smet_compile.pretrain.tokenizer import Tokenizer


class StreamSource:
    """Packs the documents of an `IterableDataset` into windows; starts over at the end of the stream."""

    def __init__(self, dataset: Any, tokenizer: Tokenizer, config: RunConfig) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer
        self._batch_shape = (config.accumulate, config.batch, config.sequence)
        self._left = numpy.zeros(0, dtype=numpy.int64)
        self._documents = self._read()

    def _read(self) -> Iterator[numpy.ndarray]:
        for epoch in count(self._dataset.epoch):
            self._dataset.set_epoch(epoch)
            empty = True
            for text in _texts(self._dataset):
                empty = False
                yield self._tokenizer.encode(text).astype(numpy.int64)
            if empty and not len(self._left):
                raise ValueError("--data: expected a stream with documents to train on, got an empty one")

    def batch(self, step: int) -> torch.Tensor:
        """The next tokens, (accumulate, batch, sequence) int64; the stream stands at `step` already."""
        wanted = int(numpy.prod(self._batch_shape))
        parts, total = [self._left], len(self._left)
        while total < wanted:
            parts.append(next(self._documents))
            total += len(parts[-1])
        tokens = numpy.concatenate(parts)
        self._left = tokens[wanted:]
        return torch.from_numpy(tokens[:wanted].copy()).view(self._batch_shape)

    def state_dict(self) -> dict[str, Any]:
        """The stream's own position and the tokens that were read but not used."""
        return {"stream": self._dataset.state_dict(), "left": self._left.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        try:
            self._dataset.load_state_dict(state["stream"])
            self._dataset.set_epoch(state["stream"]["epoch"])
            self._left = numpy.array(state["left"], dtype=numpy.int64)
        except Exception as error:
            raise ValueError(f"--resume: expected a position in this run's stream, got another ({error!r}); "
                             "begin a new run with --out") from error  # fmt: skip
        self._documents = self._read()


def _texts(dataset: Any) -> Iterator[str]:
    """The documents of a stream; ValueError where one cannot be read or holds no text."""
    examples = iter(dataset)
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"--data: the stream could not be read ({error}); check files and network") from error
        if "text" not in example:
            raise ValueError(f"--data: expected a column called text, got {', '.join(map(str, example))}")
        if not isinstance(example["text"], str):
            raise ValueError(f"--data: expected text in the column text, got {shown(example['text'])}")
        yield example["text"]


def open_stream(spec: str, config: RunConfig, tokenizer: Tokenizer) -> tuple[StreamSource, torch.Tensor]:
    """Open `NAME[:CONFIG]` on the Hugging Face hub, or a local folder: (training batches, validation).

    Validation text is the start of the "validation" split, or of "train" where there is none; what was taken
    from "train" is skipped in training.
    """
    expect_room_for_windows(config)
    name, _, variant = spec.partition(":")
    splits = _load_splits(name, variant or None)
    if "train" not in splits:
        raise ValueError(f"--data: expected a train split in hf:{spec}, got {', '.join(splits)}")
    train, own = splits["train"], splits.get("validation")
    validation, num_documents = _read_validation(train if own is None else own, config, tokenizer)
    if own is None:
        train = train.skip(num_documents)
    return StreamSource(train, tokenizer, config), validation


def _load_splits(name: str, variant: str | None) -> dict[str, Any]:
    datasets = require("datasets")
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
    for text in _texts(dataset):
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
