"""Tests weights in another dtype or memory format, and models called with another's parameters and topology."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import smet_compile as smet
from tests.support.masked import fill_masked, masked_gradients, parameter_of
from tests.support.small_models import chain
from tests.support.snapshots import assert_same, same_bits

CONVERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda weight: weight.to(memory_format=torch.channels_last),
    "float64": lambda weight: weight.to(torch.float64),
    "float64_channels_last": lambda weight: weight.to(torch.float64, memory_format=torch.channels_last),
    "channels_last_of_bfloat16": lambda weight: weight.bfloat16().to(torch.float64, memory_format=torch.channels_last),
}


class Converted(nn.Module):
    """Converts the weight of a convolution, and then uses it by the functional form."""

    def __init__(self, convert: Callable[[Tensor], Tensor], kernel_size: int) -> None:
        super().__init__()
        self.convert = convert
        self.inner = nn.Conv2d(6, 10, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.convert(self.inner.weight)
        return torch.tanh(F.conv2d(x.to(weight.dtype), weight, padding=self.inner.padding))


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
def test_a_converted_weight(conversion: str, block_shape: int | tuple[int, int], kernel_size: int) -> None:
    sparse = Converted(CONVERSIONS[conversion], kernel_size)
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5, block_shape=block_shape, include="inner")
    fill_masked(plain, sparse)
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    plain_x = x.detach().clone().requires_grad_()
    out, plain_out = sparse(x), plain(plain_x)
    out.square().sum().backward()
    plain_out.square().sum().backward()
    assert same_bits(out, plain_out) and same_bits(x.grad, plain_x.grad)
    assert same_bits(parameter_of(sparse, "inner.weight").grad, masked_gradients(plain, sparse)["inner.weight"])


class Loss(nn.Module):
    def __init__(self, seed: int, backward_inside: bool) -> None:
        super().__init__()
        self.inner = smet.sparsify(chain(), density=0.5, seed=seed)
        self.backward_inside = backward_inside

    def forward(self, x: Tensor) -> Tensor:
        loss = self.inner(x).square().mean()
        if self.backward_inside:
            loss.backward()
        return loss


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward_after", "backward_inside"])
def test_functional_call_with_another_topology(backward_inside: bool) -> None:
    """Backward goes through the topology of the call, which the model itself no longer holds by then."""
    model, other = Loss(1, backward_inside), Loss(2, backward_inside)
    twin = copy.deepcopy(other)
    x = torch.randn(5, 23, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    loss = functional_call(model, dict(other.named_parameters()) | dict(other.named_buffers()), (x,))
    twin_loss = twin(twin_x)
    if not backward_inside:
        loss.backward()
        twin_loss.backward()
    assert same_bits(loss.detach(), twin_loss.detach()) and same_bits(x.grad, twin_x.grad)
    assert_same(gradients(other), gradients(twin))
    assert set(gradients(model).values()) == {None}
