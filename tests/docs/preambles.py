"""What a reader of a page already has: his own model, batches and texts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR

from smet_compile.presets import build_preset

Names = dict[str, Any]


def _model_and_loader(names: Names) -> None:
    """A Hugging Face model of the reader's, and a few batches for it."""
    tokens = torch.randint(64, (4, 16))
    names["model"] = build_preset("nano", vocabulary=64, device="cpu")
    names["loader"] = [{"input_ids": tokens, "labels": tokens}] * 4


def _scheduler(names: Names) -> None:
    names["scheduler"] = ConstantLR(names["optimizer"])


def _corpus(names: Names) -> None:
    Path("corpus").mkdir()
    for number in range(4):
        words = random.Random(number).choices(["sparse", "weights", "move", "while", "the", "model", "learns"], k=800)
        Path(f"corpus/{number}.txt").write_text(" ".join(words))


def _step_number(names: Names) -> None:
    names["step"] = 400


def _trl(names: Names) -> None:
    """A library that the tests of the other pages do without."""
    pytest.importorskip("trl")


PREAMBLES: dict[tuple[str, str], Callable[[Names], None]] = {
    ("docs/integrations.md", "TRL"): _trl,
    ("README.md", "smet_compile"): _model_and_loader,
    ("README.md", "Compiled"): _scheduler,
    ("README.md", "Two commands"): _corpus,
    ("README.md", "Stop, go on, leave"): _step_number,
}
"""(page, heading) → what is put among the page's names before the first sample under that heading."""
