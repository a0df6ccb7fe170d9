"""Without warm-up, density scaling and topology changes, ActiveAdamW is torch.optim.AdamW."""

import copy

import pytest
import torch
from torch import nn

import smet_compile as smet
from tests.support.small_models import two_layers
from tests.support.training import train

TOLERANCE = {torch.float64: {"atol": 1e-10, "rtol": 1e-10}, torch.float32: {"atol": 2e-6, "rtol": 2e-6}}
OPTIONS = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.1}


def assert_parameters_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[a.dtype], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_parameters(dtype: torch.dtype) -> None:
    ours = two_layers().to(dtype)
    theirs = copy.deepcopy(ours)
    train(ours, smet.ActiveAdamW(ours, **OPTIONS, warmup_steps=0), steps=50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS), steps=50)
    assert_parameters_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_parameters_know_no_warm_up(dtype: torch.dtype) -> None:
    ours = two_layers().to(dtype)
    theirs = copy.deepcopy(ours)
    train(ours, smet.ActiveAdamW(ours, **OPTIONS, warmup_steps=100), steps=20)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS), steps=20)
    assert_parameters_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("block_shape", [1, (1, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("make", [smet.ActiveAdamW, smet.NaiveAdamW], ids=["active", "naive"])
def test_compact_weights(make, block_shape: int | tuple[int, int], dtype: torch.dtype) -> None:
    ours = smet.sparsify(two_layers().to(dtype), density=0.4, block_shape=block_shape)
    theirs = copy.deepcopy(ours)
    train(ours, make(ours, **OPTIONS, warmup_steps=0, lr_density_exponent=0.0), steps=50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS), steps=50)
    assert_parameters_equal(ours, theirs)


def test_density_scales_the_rate() -> None:
    """An exponent p of 0.5 at density 0.25 doubles the rate."""
    ours = smet.sparsify(two_layers().double(), density=0.25, include="0.weight")
    theirs = copy.deepcopy(ours)
    train(ours, smet.ActiveAdamW(ours, lr=1e-3, warmup_steps=0, lr_density_exponent=0.5), steps=20)
    compact = [p for n, p in theirs.named_parameters() if "parametrizations" in n]
    plain = [p for n, p in theirs.named_parameters() if "parametrizations" not in n]
    groups = [{"params": compact, "lr": 2e-3}, {"params": plain}]
    train(theirs, torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0), steps=20)
    assert_parameters_equal(ours, theirs)


def test_defaults() -> None:
    group = smet.ActiveAdamW(smet.sparsify(two_layers(), density=0.5)).param_groups[0]
    expected = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert {key: group[key] for key in expected} == expected
    assert group["warmup_steps"] == 100 and group["lr_density_exponent"] == 1.0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)], ids=str)
def test_an_empty_parameter_is_no_trouble(shape: tuple[int, ...]) -> None:
    model = nn.Linear(3, 2)
    model.empty = nn.Parameter(torch.zeros(shape))
    optimizer = smet.ActiveAdamW(model)
    (model(torch.ones(1, 3)).sum() + model.empty.sum()).backward()
    before = model.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model.bias, before) and model.empty.shape == shape
