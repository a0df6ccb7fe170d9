"""However a model is copied, the copy trains on exactly as the original does, topology updates included."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train


def build(block_shape: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return smet.sparsify(two_layers(), density=0.5, block_shape=block_shape, seed=seed)


def saved_and_loaded(model: nn.Module, block_shape: Any) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build(block_shape, seed=7)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def assigned(model: nn.Module, block_shape: Any) -> nn.Module:
    other = build(block_shape, seed=7)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


def assigned_from_meta(model: nn.Module, block_shape: Any) -> nn.Module:
    with torch.device("meta"):
        other = two_layers()
    smet.sparsify(other, density=0.5, block_shape=block_shape)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


WAYS = [saved_and_loaded, assigned, assigned_from_meta, lambda model, _: copy.deepcopy(model)]
NAMES = ["save_load", "assign", "assign_from_meta", "deepcopy"]


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_the_copy_trains_on_as_the_original(way: Callable[..., nn.Module], block_shape: Any, grow: str) -> None:
    model = build(block_shape)
    options = {"total_steps": 1000, "every": 3, "grow": grow, "schedule": "cosine"}
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5)
    manager = smet.TopologyManager(model, optimizer, **options)
    train(model, optimizer, manager, steps=4)
    other = way(model, block_shape)
    other_optimizer = smet.ActiveAdamW(other, lr=1e-2, warmup_steps=5)
    other_optimizer.load_state_dict(optimizer.state_dict())
    other_manager = smet.TopologyManager(other, other_optimizer, **options)
    other_manager.load_state_dict(manager.state_dict())
    assert_same(snapshot(other), snapshot(model))
    expected = train(model, optimizer, manager, first=4, steps=4)
    assert train(other, other_optimizer, other_manager, first=4, steps=4) == expected
    assert len(other_manager.history) == len(manager.history) == 2
    assert_same(snapshot(other, other_optimizer), snapshot(model, optimizer))


def test_keys_and_dtypes() -> None:
    state = build(1).state_dict()
    assert state["0.parametrizations.weight.original"].shape == (120,)
    topology = state["0.parametrizations.weight.0.topology"]
    assert topology.dtype == torch.uint8 and topology.numel() == 30
    assert set(state) == {
        "0.parametrizations.weight.original",
        "0.parametrizations.weight.0.topology",
        "0.bias",
        "3.parametrizations.weight.original",
        "3.parametrizations.weight.0.topology",
        "3.bias",
    }


def test_a_deepcopy_shares_nothing() -> None:
    model = build(1)
    twin = copy.deepcopy(model)
    before = snapshot(model)
    optimizer = smet.ActiveAdamW(twin, lr=1e-2)
    train(twin, optimizer, smet.TopologyManager(twin, optimizer, total_steps=100, every=2), steps=5)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_moving_to_another_dtype(dtype: torch.dtype) -> None:
    model = build((4, 4)).to(dtype)
    masks = [site.compact.mask() for site in find_sites(model).values()]
    assert all(torch.equal(a.compact.mask(), b) for a, b in zip(find_sites(build((4, 4))).values(), masks, strict=True))
    train(model, smet.ActiveAdamW(model), steps=1)
