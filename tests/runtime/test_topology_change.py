"""A topology change keeps survivors (value, moments, age) bit for bit and everything else is zero."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.rows import assert_moved
from tests.support.training import train


@dataclass
class Seen:
    mask: Tensor
    tensors: dict[str, Tensor]


def look(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Seen]:
    seen = {}
    for name, site in find_sites(model).items():
        tensors = {"values": site.values.detach().clone()}
        for key, state in optimizer.state[site.values].items():
            if isinstance(state, Tensor) and state.shape == site.values.shape and key != "generation":
                tensors[key] = state.clone()
        if isinstance(optimizer, smet.ActiveAdamW):
            tensors["age"] = optimizer.block_ages(site.values).clone()
        seen[name] = Seen(site.compact.mask().clone(), tensors)
    return seen


def update_and_judge(model: nn.Module, optimizer: torch.optim.Optimizer, grow: str) -> int:
    """Three steps, an update after the third; returns the number of dropped blocks."""
    manager = smet.TopologyManager(
        model, optimizer, auto_step=False, total_steps=100, every=3, drop_fraction=0.3, grow=grow, schedule="cosine"
    )
    train(model, optimizer, manager, steps=2)
    loss = (model(torch.randn(9, 12)) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = look(model, optimizer)
    storages = [site.values.data_ptr() for site in find_sites(model).values()]
    event = manager.step()
    assert event is not None
    assert storages == [site.values.data_ptr() for site in find_sites(model).values()]
    for name, after in look(model, optimizer).items():
        old = before[name]
        assert after.mask.sum() == old.mask.sum()
        num_dropped = int((old.mask & ~after.mask).sum())
        assert num_dropped == event.sites[name].num_dropped == int(event.drop_fraction * int(old.mask.sum()))
        assert after.tensors.keys() == old.tensors.keys()
        for key, tensor in after.tensors.items():
            fresh = optimizer.param_groups[0]["lr"] if key == "step_size" else 0.0  # Rprop's step sizes begin there
            assert_moved(old.tensors[key], old.mask, tensor, after.mask, f"{name} {key}", fresh)
    return event.num_dropped


@given(
    st.sampled_from([1, (1, 4), (4, 4), (3, 2)]),
    st.floats(0.1, 0.7),
    st.sampled_from(["random", "gradient"]),
    st.integers(0, 1000),
)
def test_active_adamw(block_shape: int | tuple[int, int], density: float, grow: str, seed: int) -> None:
    model = nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 7))
    smet.sparsify(model, density=density, block_shape=block_shape, seed=seed)
    update_and_judge(model, smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5), grow)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.SGD(ps, lr=0.1),
        lambda ps: torch.optim.AdamW(ps, amsgrad=True),
        lambda ps: torch.optim.RMSprop(ps, momentum=0.9, centered=True),
        lambda ps: torch.optim.Adagrad(ps),
        lambda ps: torch.optim.Adamax(ps),
        lambda ps: torch.optim.NAdam(ps),
        lambda ps: torch.optim.RAdam(ps),
        lambda ps: torch.optim.Rprop(ps),
        lambda ps: torch.optim.Adadelta(ps),
        lambda ps: torch.optim.ASGD(ps),
    ],
    ids=[
        "sgd-momentum",
        "sgd",
        "adamw",
        "rmsprop",
        "adagrad",
        "adamax",
        "nadam",
        "radam",
        "rprop",
        "adadelta",
        "asgd",
    ],
)
@pytest.mark.parametrize("block_shape", [1, (2, 4)], ids=str)
def test_any_elementwise_optimizer(make, block_shape: int | tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 7))
    smet.sparsify(model, density=0.5, block_shape=block_shape)
    assert update_and_judge(model, make(model.parameters()), "random") > 0


@pytest.mark.parametrize("moment_dtype", [torch.bfloat16, "int8"], ids=str)
def test_states_of_few_bits(moment_dtype: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 7))
    smet.sparsify(model, density=0.5)
    optimizer = smet.ActiveAdamW(model, lr=1e-2, moment_dtype=moment_dtype)
    assert update_and_judge(model, optimizer, "random") > 0
    stored = torch.uint8 if moment_dtype == "int8" else moment_dtype
    assert all(optimizer.state[s.values]["exp_avg"].dtype == stored for s in find_sites(model).values())


def test_naive_rule_moves_moments_too() -> None:
    model = nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 7))
    smet.sparsify(model, density=0.5)
    assert update_and_judge(model, smet.NaiveAdamW(model, lr=1e-2), "random") > 0
