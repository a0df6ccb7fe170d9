"""`module.weight.requires_grad_()` freezes a compact weight, and gradients are not given to a read."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import smet_compile as smet
from tests.support.small_models import sparse_layers
from tests.support.training import train


def freeze_by_method(layer: nn.Module, is_trained: bool) -> None:
    layer.weight.requires_grad_(is_trained)


def freeze_by_attribute(layer: nn.Module, is_trained: bool) -> None:
    layer.weight.requires_grad = is_trained


@torch.no_grad()
def freeze_without_gradients(layer: nn.Module, is_trained: bool) -> None:
    layer.weight.requires_grad_(is_trained)


@pytest.mark.parametrize("freeze", [freeze_by_method, freeze_by_attribute, freeze_without_gradients])
def test_a_weight_is_frozen_and_trained_again_as_a_parameter_is(freeze: Callable[[nn.Module, bool], None]) -> None:
    model = sparse_layers()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for is_trained in (True, False, False, True):
        freeze(model[0], is_trained)
        assert model[0].weight.requires_grad is is_trained
        twin[0].parametrizations.weight.original.requires_grad_(is_trained)
        losses = [train(each, optimizer) for each, optimizer in zip((model, twin), optimizers, strict=True)]
        assert losses[0] == losses[1]
        assert torch.equal(model[0].weight, twin[0].weight)
    assert model[0].parametrizations.weight.original.requires_grad


def test_freezing_changes_later_reads_and_no_graph_that_is_there() -> None:
    layer = sparse_layers()[0]
    values, read = layer.parametrizations.weight.original, layer.weight
    loss = read.square().sum()
    assert read.requires_grad_(False) is read and read.requires_grad and not layer.weight.requires_grad
    assert layer.weight.requires_grad_().requires_grad is False and layer.weight.requires_grad
    loss.backward()
    assert torch.equal(values.grad, 2 * values)
    leaf = layer.weight.detach().requires_grad_()
    (3 * leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 3)) and torch.equal(values.grad, 2 * values)
    leaf.grad = None
    leaf.requires_grad = False
    assert leaf.grad is None and not leaf.requires_grad and layer.weight.requires_grad


def test_a_gradient_that_is_given_to_a_read_is_refused() -> None:
    model = sparse_layers()
    for given in (torch.ones_like(model[0].weight), None):
        with pytest.raises(
            ValueError, match=r"0.weight: .* set that of the values, 0.parametrizations.weight.original.g"
        ):
            model[0].weight.grad = given
    layer = smet.sparsify(nn.Linear(12, 7), density=0.5)
    with pytest.raises(ValueError, match=r"values, parametrizations.weight.original.grad$"):
        layer.weight.grad = torch.ones(7, 12)
    kept = layer.weight
    kept.retain_grad()
    kept.sum().backward()
    assert torch.equal(kept.grad, torch.ones(7, 12))
    kept.grad = None
    assert kept.grad is None


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_frozen_read_goes_into_a_compiled_function(backend: str) -> None:
    layer = sparse_layers()[0]
    layer.weight.requires_grad_(False)
    double = torch.compile(lambda weight: 2 * weight, backend=backend, fullgraph=True)
    for is_trained in (False, True):
        layer.weight.requires_grad_(is_trained)
        result = double(layer.weight)
        assert result.requires_grad is is_trained and torch.equal(result, 2 * layer.weight)
