"""Makes the model, optimizer and manager of the runtime tests; its step is called, so that tests look before it."""

from typing import Any

import torch
from torch import nn

import smet_compile as smet
from tests.support.small_models import two_layers


def make(
    density: float = 0.5, block_shape: Any = 1, dropout: float = 0.0, optimizer: Any = None, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, smet.TopologyManager]:
    model = smet.sparsify(two_layers(dropout), density=density, block_shape=block_shape)
    made = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5) if optimizer is None else optimizer(model)
    given = {"total_steps": 1000, "every": 3, "schedule": "cosine", "auto_step": False} | options
    return model, made, smet.TopologyManager(model, made, **given)
