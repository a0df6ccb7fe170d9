"""The optimizer's state survives saving, in every dtype; integers stay integers in a bf16 model."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train


def make(dtype: torch.dtype, moment_dtype: Any, seed: int = 0) -> tuple[nn.Module, smet.ActiveAdamW]:
    model = smet.sparsify(two_layers().to(dtype), density=0.5, seed=seed)
    return model, smet.ActiveAdamW(model, lr=1e-2, moment_dtype=moment_dtype)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16, "int8"], ids=str)
def test_round_trip_and_further_training(dtype: torch.dtype, moment_dtype: Any) -> None:
    model, optimizer = make(dtype, moment_dtype)
    manager = smet.TopologyManager(model, optimizer, total_steps=1000, every=4)
    train(model, optimizer, manager, steps=10)
    other, other_optimizer = make(dtype, moment_dtype, seed=9)
    other_manager = smet.TopologyManager(other, other_optimizer, total_steps=1000, every=4)
    other.load_state_dict(through_a_file(model.state_dict()))
    other_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    other_manager.load_state_dict(manager.state_dict())
    assert_same(snapshot(other, other_optimizer), snapshot(model, optimizer))
    ours = train(model, optimizer, manager, first=10, steps=10)
    theirs = train(other, other_optimizer, other_manager, first=10, steps=10)
    assert ours == theirs
    assert_same(snapshot(other, other_optimizer), snapshot(model, optimizer))


def test_integers_beyond_256_survive_in_a_bfloat16_model() -> None:
    """Optimizer.load_state_dict casts states to the parameter's dtype: 257 would become 256."""
    model, optimizer = make(torch.bfloat16, None)
    train(model, optimizer, steps=257)
    other, other_optimizer = make(torch.bfloat16, None)
    other_optimizer.load_state_dict(optimizer.state_dict())
    for site, twin in zip(find_sites(model).values(), find_sites(other).values(), strict=True):
        assert_same(dict(other_optimizer.state[twin.values]), dict(optimizer.state[site.values]))
        assert bool((other_optimizer.block_ages(twin.values) == 257).all())
        integers = [s for s in other_optimizer.state[twin.values].values() if isinstance(s, Tensor)]
        assert {torch.uint8, torch.int64} <= {s.dtype for s in integers}


def test_loading_copies() -> None:
    model, optimizer = make(torch.float32, None)
    train(model, optimizer, steps=2)
    other, other_optimizer = make(torch.float32, None)
    state = optimizer.state_dict()
    before = snapshot(optimizer)
    other_optimizer.load_state_dict(state)
    train(other, other_optimizer, steps=2)
    assert_same(snapshot(optimizer), before)


def test_skipped_blocks_are_remembered() -> None:
    model, optimizer = make(torch.float32, None)
    model(torch.randn(2, 12)).sum().backward()
    find_sites(model)["0.weight"].values.grad[:3] = torch.nan
    optimizer.step()
    _other, other_optimizer = make(torch.float32, None)
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_optimizer.num_skipped_blocks == 3


def test_a_state_of_an_older_version_has_one_warmup() -> None:
    model, optimizer = make(torch.float32, None)
    train(model, optimizer, steps=2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["initial_warmup_steps"]
    other = smet.ActiveAdamW(model, lr=1e-2, initial_warmup_steps=7)
    other.load_state_dict(state)
    assert [group["initial_warmup_steps"] for group in other.param_groups] == [100]
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_both_warmups_are_saved() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = smet.ActiveSGD(model, warmup_steps=0, initial_warmup_steps=7)
    train(model, optimizer, steps=2)
    other = smet.ActiveSGD(model, warmup_steps=3)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [(group["warmup_steps"], group["initial_warmup_steps"]) for group in other.param_groups] == [(0, 7)]
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
