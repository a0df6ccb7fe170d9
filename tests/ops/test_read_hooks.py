"""Hooks on the gradient of ``module.weight``: called where the read is used, and never lost in silence."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import torch_insides

UNHEARD = "no backward went through.*0.parametrizations.weight.original"


@pytest.fixture(autouse=True)
def nothing_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_insides, "_warned", set())


def sparse() -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), density=0.4)


def zeros(gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient)


def test_a_hook_on_a_read_that_nothing_uses_is_told() -> None:
    model = sparse()
    with pytest.warns(UserWarning, match=UNHEARD):
        model[0].weight.register_hook(zeros)
    model(torch.ones(2, 8)).sum().backward()
    assert model[0].parametrizations.weight.original.grad.any()


def test_the_hook_that_is_advised_works() -> None:
    model = sparse()
    model[0].parametrizations.weight.original.register_hook(zeros)
    model(torch.ones(2, 8)).sum().backward()
    assert not model[0].parametrizations.weight.original.grad.any()
    assert model[2].parametrizations.weight.original.grad.any()


def test_a_hook_on_the_read_that_the_forward_uses_is_called() -> None:
    model = sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = model[0].weight
        handles = [weight.register_hook(zeros), weight.register_hook(lambda gradient: gradient + 1)]
        loss = F.linear(torch.ones(2, 8), weight, model[0].bias).sum()
        del weight
        loss.backward()
        del loss
    assert torch.equal(model[0].parametrizations.weight.original.grad, torch.ones(51))
    assert len(handles) == 2


def test_a_hook_on_an_alias_that_became_a_leaf_is_called() -> None:
    model = sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leaf = model[0].weight.detach().requires_grad_()
        leaf.register_hook(zeros)
        F.linear(torch.ones(2, 8), leaf).sum().backward()
    assert leaf.grad is not None and not leaf.grad.any()


def test_a_frozen_weight_refuses_a_hook_as_a_dense_one_does() -> None:
    model = sparse()
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="cannot register a hook"):
        model[0].weight.register_hook(zeros)


def test_nothing_is_said_where_the_interpreter_ends() -> None:
    made = "import torch, smet_compile as s; m = s.sparsify(torch.nn.Linear(8, 8), 0.5); w = m.weight; "
    code = made + "w.register_hook(abs)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
