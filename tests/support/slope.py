"""Defines a model with a chosen, constant gradient: loss = <weight, slope>."""

import torch
from torch import Tensor, nn


class Slope(nn.Linear):
    def __init__(self, rows: int, cols: int, slope: Tensor | float = 1.0) -> None:
        super().__init__(cols, rows, bias=False)
        self.register_buffer("slope", torch.as_tensor(slope).expand(rows, cols).clone())

    def forward(self) -> Tensor:
        return (self.weight * self.slope).sum()


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model().backward()
    optimizer.step()
    optimizer.zero_grad()
