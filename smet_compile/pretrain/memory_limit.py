"""Lack of memory, foreseen where numbers alone tell, and explained where it comes later."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smet_compile.presets import find_preset
from smet_compile.pretrain.config import DTYPES, RunConfig

INTEGER_BYTES = 8
SPARSE_WEIGHTS_IN_LAYER = 7
ADVICE = "take a smaller --batch (and a larger --accumulate), a shorter --sequence, or a smaller --preset"
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def expect_enough_memory(config: RunConfig, vocab_size: int) -> None:
    """Raise ValueError for settings whose smallest possible need is beyond the memory of the machine or device."""
    preset, (rows, columns) = find_preset(config.preset), config.block_shape
    logits = config.batch * config.sequence * vocab_size * DTYPES[config.dtype].itemsize
    blocks = preset.layers * SPARSE_WEIGHTS_IN_LAYER * rows * columns * DTYPES[config.dtype].itemsize
    _expect("--batch x --sequence", "the logits of a micro-batch", logits, _device_bytes(config.device))
    _expect("--block", "one block of each sparse weight", blocks, _device_bytes(config.device))
    _expect("--batch x --accumulate x --sequence", "the tokens of a step", config.step_tokens * INTEGER_BYTES, _bytes())


def expect_room_for_windows(config: RunConfig) -> None:
    """Raise ValueError where the held-out text of a stream, which may have no end, is larger than the memory."""
    windows = config.eval_windows * config.sequence * INTEGER_BYTES
    _expect("--eval-windows x --sequence", "the held-out tokens of a stream", windows, _bytes())


def _expect(option: str, what: str, needed: int, available: int) -> None:
    if needed > available:
        raise ValueError(
            f"{option}: expected {what} to fit into {available / 2**30:.1f} GiB of memory, got "
            f"{needed / 2**30:.4g} GiB; take smaller numbers"
        )


def _bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _device_bytes(device: str) -> int:
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _bytes()


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """Turn an allocation that failed into a ValueError that says what to make smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in SIGNS):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"there is not enough memory ({reason}); {ADVICE}") from error
