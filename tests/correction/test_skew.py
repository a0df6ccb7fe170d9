"""The gradient of a row falls with the square root of its fan-in where batch norm reads it, also in a concatenation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites

ROWS, WIDTH, BATCHES = 96, 96, 24


class Net(nn.Module):
    """Has a convolution whose rows have 12 to 96 active weights, put beside its input for ``norm``."""

    def __init__(self, norm: nn.Module, is_inside: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.is_inside = nn.Conv2d(WIDTH, ROWS, 1, bias=False), norm, is_inside

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((x, self.conv(x)), 1)
        y = torch.cat((y, x[:, :5]), 1) if self.is_inside else y
        return torch.tanh(self.norm(y))


def exponent_of(norm: nn.Module, is_inside: bool, correct: Callable[[nn.Module], object]) -> float:
    """Returns the slope of log rms(gradient of a row) over log fan-in, for random gradients of the output."""
    torch.manual_seed(0)
    fan_in = torch.logspace(1.0792, 1.9823, ROWS).round().int()[torch.randperm(ROWS)]
    mask = torch.rand(ROWS, WIDTH).argsort(1).argsort(1) < fan_in[:, None]
    model = Net(norm, is_inside).double()
    with torch.no_grad():  # all of one size, so that the root of the fan-in is that of the row's norm
        model.conv.weight.copy_(torch.randn_like(model.conv.weight).sign())
    smet.sparsify(model, masks={"conv.weight": mask[..., None, None]})
    correct(model)
    (site,) = find_sites(model).values()
    squares = torch.zeros(ROWS, dtype=torch.float64)
    for _ in range(BATCHES):
        y = model(torch.randn(32, WIDTH, 3, 3, dtype=torch.float64))
        (y * torch.randn_like(y)).sum().backward()
        dense = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter_(mask, site.values.grad.square())
        squares += dense.sum(1) / fan_in
        model.zero_grad()
    x, y = fan_in.double().log(), squares.sqrt().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def correct(model: nn.Module) -> None:
    example = torch.randn(2, WIDTH, 3, 3, dtype=torch.float64)
    result = smet.correct_gradients(model, torch.optim.SGD(model.parameters(), lr=0.1), example)
    assert result.corrected == ("conv.weight",)


@pytest.mark.parametrize("is_inside", [False, True], ids=["one", "nested"])
def test_a_concatenation_that_batch_norm_reads(is_inside: bool) -> None:
    """Batch norm takes 1/12 of the square of 12 gradients, the part along the row, so 0.02 of the slope."""
    width = WIDTH + ROWS + 5 * is_inside
    assert exponent_of(nn.BatchNorm2d(width), is_inside, lambda model: None) == pytest.approx(-0.5, abs=0.03)
    assert exponent_of(nn.BatchNorm2d(width), is_inside, correct) == pytest.approx(0, abs=0.03)


def test_no_skew_without_batch_norm() -> None:
    small = nn.Conv2d(WIDTH + ROWS, WIDTH + ROWS, 1, groups=WIDTH + ROWS, bias=False)
    nn.init.constant_(small.weight, 1e-3)
    assert exponent_of(small, False, lambda model: None) == pytest.approx(0, abs=0.03)
