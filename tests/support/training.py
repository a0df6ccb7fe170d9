"""Provides the training loop that every test uses."""

from typing import Any

import torch
from torch import nn

from tests.support.small_models import batch


def loss_on(model: nn.Module, step: int, num_inputs: int = 12, num_outputs: int = 7) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x, y = batch(step, num_inputs, num_outputs, dtype)
    return (model(x) - y).square().mean()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    manager: Any = None,
    *,
    first: int = 0,
    steps: int = 1,
    scheduler: Any = None,
) -> list[float]:
    """Returns the losses of steps first .. first + steps - 1."""
    losses = []
    for step in range(first, first + steps):
        loss = loss_on(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if manager is not None:
            manager.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses
