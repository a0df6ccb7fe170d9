"""Local text: a pure function from (seed, step) to a batch, and a held-out end."""

import hashlib
from functools import lru_cache
from typing import Any

import numpy
import torch

from smet_compile.pretrain.config import RunConfig

HELD_OUT_FRACTION = 0.05


class WindowSource:
    """Batches of whole windows of a token array; each epoch is another permutation of all windows."""

    def __init__(self, tokens: numpy.ndarray, config: RunConfig) -> None:
        self._windows = as_windows(tokens, config.sequence)
        self._batch_shape = (config.accumulate, config.batch, config.sequence)
        self._seed = config.seed
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> numpy.ndarray:
        return numpy.random.default_rng((self._seed, epoch)).permutation(len(self._windows))

    def batch(self, step: int) -> torch.Tensor:
        """The tokens of step `step`, (accumulate, batch, sequence) int64."""
        count = self._batch_shape[0] * self._batch_shape[1]
        places = (divmod(row, len(self._windows)) for row in range(step * count, (step + 1) * count))
        rows = [self._order(epoch)[position] for epoch, position in places]
        return torch.from_numpy(self._windows[rows].astype(numpy.int64)).view(self._batch_shape)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step number is the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def as_windows(tokens: numpy.ndarray, sequence: int) -> numpy.ndarray:
    """Cut (T,) into whole windows (T // sequence, sequence)."""
    count = len(tokens) // sequence
    return tokens[: count * sequence].reshape(count, sequence)


def split_tokens(tokens: numpy.ndarray, config: RunConfig) -> tuple[WindowSource, torch.Tensor, str]:
    """Keep the last 5% (at least one window) for validation: (training batches, validation, hash of tokens).

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
    return WindowSource(train, config), validation, hashlib.sha256(tokens.tobytes()).hexdigest()
