"""From `--data` to batches of training tokens and a held-out validation split."""

import os
import random
import sysconfig
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch

from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.extras import require
from smet_compile.pretrain.stream import open_stream
from smet_compile.pretrain.tokenizer import Tokenizer
from smet_compile.pretrain.windows import split_tokens

KINDS = "stdlib, text:GLOB or hf:NAME[:CONFIG]"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Source(Protocol):
    """Training batches by step number. `state_dict` is what a checkpoint must hold to go on from here."""

    def batch(self, step: int) -> torch.Tensor:
        """The tokens of step `step` (from 0), (accumulate, batch, sequence) int64."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a position."""
        ...


@dataclass(frozen=True)
class Data:
    """Training batches, validation windows (W, sequence) outside of them, and a hash of a local corpus."""

    train: Source
    validation: torch.Tensor
    fingerprint: str


def open_data(config: RunConfig, tokenizer: Tokenizer) -> Data:
    """Open what `config.data` names; a ValueError says what is wrong with it."""
    kind, _, rest = config.data.partition(":")
    if kind == "hf" and rest:
        return Data(*open_stream(rest, config, tokenizer), fingerprint="")
    if config.data == "stdlib":
        paths = stdlib_paths()
    elif kind == "text" and rest:
        paths = text_paths(rest)
    else:
        raise ValueError(f"--data: expected {KINDS}, got {config.data!r}")
    return Data(*split_tokens(read_tokens(paths, tokenizer), config))


def stdlib_paths() -> list[Path]:
    """The Python files of the standard library, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def text_paths(pattern: str) -> list[Path]:
    """The files that match the glob `pattern`, sorted; a ValueError if there are none."""
    paths = sorted(Path(name) for name in glob(pattern, recursive=True) if os.path.isfile(name))
    if not paths:
        what = "a folder; add /*.txt, say" if os.path.isdir(pattern) else "none; check the path and quote the glob"
        raise ValueError(f"--data: expected files that match {pattern!r}, got {what}")
    return paths


def read_tokens(paths: list[Path], tokenizer: Tokenizer) -> numpy.ndarray:
    """The tokens of all files, (T,), in an order that is mixed but always the same."""
    datasets = require("datasets")
    mixed = random.Random(0).sample(paths, len(paths))
    files = datasets.Dataset.from_dict({"path": [os.fsencode(path) for path in mixed]}).to_iterable_dataset()
    return numpy.concatenate([tokenizer.encode(example["text"]) for example in files.map(_read_text)])


def _read_text(example: dict[str, bytes]) -> dict[str, str]:
    path = os.fsdecode(example["path"])
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"--data: expected files that can be read, got {path} ({error.strerror})") from error
    if "\0" in text:
        raise ValueError(f"--data: expected text in UTF-8, got {path}, which holds NUL characters; leave that file out")
    return {"text": text}
