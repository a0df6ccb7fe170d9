"""Defines small models of awkward sizes, with smooth activations, so that no gradient is zero by accident."""

from typing import Any

import torch
from torch import Tensor, nn

import smet_compile as smet


class ToyExperts(nn.Module):
    """Is a dense mixture: every expert sees every token. One stacked weight is used by bmm, one by einsum."""

    def __init__(self, num_experts: int, size: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(num_experts, inner, size) / size**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, size, inner) / inner**0.5)

    def forward(self, x_TC: Tensor) -> Tensor:
        stacked = x_TC.expand(self.up_proj.shape[0], -1, -1)
        hidden = torch.tanh(torch.bmm(stacked, self.up_proj.transpose(1, 2)))
        return torch.einsum("sti,sci->tc", hidden, self.down_proj)


class RaggedNet(nn.Module):
    """Has a linear with bias, one without, and an experts module; no size is a multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(50, 37)
        self.experts = ToyExperts(3, 37, 20)
        self.second = nn.Linear(37, 41, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden + self.experts(hidden))


SITES_OF_RAGGED_NET = ("first.weight", "experts.up_proj", "experts.down_proj", "second.weight")


def two_layers(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Dropout(dropout), nn.Linear(20, 7))


def sparse_layers(block_shape: Any = 1) -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(two_layers(), 0.5, block_shape=block_shape)


def batch(step: int, num_inputs: int, num_outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns the data of a step, a function of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(9, num_inputs, generator=generator, dtype=torch.float64)
    y = torch.randn(9, num_outputs, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(23, 29), nn.GELU(), nn.Linear(29, 31, bias=False), nn.GELU(), nn.Linear(31, 23))
