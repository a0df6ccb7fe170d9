"""Defines small networks with batch norm in float64, and their training written out with dense masked weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.masked import grids_of, masks_of

SITES = ("conv.weight", "point.weight", "linear.weight", "head.weight")


class Net(nn.Module):
    """Has a 3x3 and a 1x1 convolution and a linear layer that feed batch norm, and a head that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)
        self.point, self.norm2 = nn.Conv2d(10, 14, 1, stride=2, bias=False), nn.BatchNorm2d(14)
        self.linear, self.norm3 = nn.Linear(14, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        x = torch.tanh(self.norm2(self.point(x))).mean((2, 3))
        return self.head(torch.tanh(self.norm3(self.linear(x))))


def images(step: int = 0) -> Tensor:
    return torch.randn(9, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def loss_of(model: Callable[..., Any], x: Tensor) -> Tensor:
    return model(x).sub(torch.linspace(0, 1, 5, dtype=x.dtype)).square().mean()


def sparse_net(block_shape: Any = 1, density: float = 0.4) -> nn.Module:
    return smet.sparsify(Net().double(), density, block_shape=block_shape, include=list(SITES))


def factors_by_mask(model: nn.Module) -> dict[str, Tensor]:
    """Returns for each site of the model √(k / k̄) of each row, by the masks alone, to multiply a dense gradient."""
    masks, grids = masks_of(model), grids_of(model)
    found = {}
    for name in find_sites(model):
        active = grids[name].spread(masks[name])
        fan_in = active.flatten(1).sum(1).double()
        found[name] = (fan_in / fan_in.mean()).sqrt().view(-1, *[1] * (active.dim() - 1))
    return found


def train_twin(model: nn.Module, corrected: set[str], lr: float, momentum: float, num_steps: int) -> dict[str, Tensor]:
    """Returns the dense weights after steps of SGD on masked weights, with multiplied gradients where corrected."""
    masks, grids, factors = masks_of(model), grids_of(model), factors_by_mask(model)
    active = {name: grids[name].spread(mask) for name, mask in masks.items()}
    plain = Net().double()
    weights = {name: _read(model, name) for name, _ in plain.named_parameters()}
    buffers = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    state = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    for step in range(num_steps):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        loss = loss_of(lambda x, all=leaves | state: functional_call(plain, all, (x,)), images(step))
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            grad = grad * active.get(name, 1.0) * (factors[name] if name in corrected else 1.0)
            buffers[name] = momentum * buffers[name] + grad
            weights[name] = weights[name] - lr * buffers[name]
    return weights


def _read(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute).detach().clone()


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(
            _read(model, name), weight, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
