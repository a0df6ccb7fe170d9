"""What a reader of a page already has: his own model, batches and texts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, TensorDataset

from smet_compile import ActiveAdamW, sparsify
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


def _trl(names: Names) -> None:
    """A library that the tests of the other pages do without."""
    pytest.importorskip("trl")


def _sparse_model(names: Names) -> None:
    names["model"] = sparsify(build_preset("nano", vocabulary=64, device="cpu"), density=0.3)


def _lightning_module(names: Names) -> None:
    """A module of the reader's, and a few batches for it."""
    import lightning.pytorch as pl

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self.layers(x), y)

        def configure_optimizers(self) -> Any:
            return ActiveAdamW(self, lr=1e-3)

    names["Net"] = Net
    names["loader"] = DataLoader(TensorDataset(torch.randn(24, 16), torch.randn(24, 4)), batch_size=4)


PREAMBLES: dict[tuple[str, str], Callable[[Names], None]] = {
    ("docs/integrations.md", "TRL"): _trl,
    ("README.md", "smet_compile"): _model_and_loader,
    ("README.md", "Compiled"): _scheduler,
    ("README.md", "Two commands"): _corpus,
    ("docs/lightning.md", "Lightning"): _lightning_module,
    ("docs/saving.md", "A folder to share"): _sparse_model,
}
"""(page, heading) → what is put among the page's names before the first sample under that heading."""
