"""Compact training equals a dense weight times a mask: fp64, 1e-10, 300 steps, four updates."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.dense_twin import DenseTwin, Rule, SgdMomentum, SmetAdamW, TwinSite
from tests.support.masked import dense_weight, fill_masked, grids_of, masks_of
from tests.support.pairs import pairwise
from tests.support.small_models import SITES_OF_RAGGED_NET, RaggedNet, batch

TOLERANCE = 1e-10
Make = Callable[[nn.Module], torch.optim.Optimizer]

RULES: dict[str, tuple[Rule, Make]] = {
    "sgd": (SgdMomentum(0.05, 0.9), lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)),
    "active_adamw": (
        SmetAdamW(2e-3, weight_decay=0.1, warmup_steps=40, exponent=1.0),
        lambda model: smet.ActiveAdamW(model, lr=2e-3, weight_decay=0.1, warmup_steps=40),
    ),
    "active_adamw_other": (
        SmetAdamW(3e-3, betas=(0.8, 0.95), eps=1e-6, warmup_steps=0, exponent=0.5),
        lambda model: smet.ActiveAdamW(
            model, lr=3e-3, betas=(0.8, 0.95), eps=1e-6, warmup_steps=0, lr_density_exponent=0.5
        ),
    ),
}


def make_pair(block_shape: tuple[int, int], rule: Rule) -> tuple[nn.Module, DenseTwin]:
    model = RaggedNet().double()
    plain = copy.deepcopy(model)
    smet.sparsify(model, density=0.5, block_shape=block_shape, seed=3)
    fill_masked(plain, model)
    masks, grids = masks_of(model), grids_of(model)
    assert set(masks) == set(SITES_OF_RAGGED_NET)
    return model, DenseTwin(plain, {name: TwinSite(grids[name], masks[name]) for name in masks}, rule)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def assert_equal_to_twin(model: nn.Module, optimizer: torch.optim.Optimizer, twin: DenseTwin) -> None:
    for name, weight in twin.weights.items():
        assert_close(dense_weight(model, name), weight, name)
    if not isinstance(optimizer, smet.ActiveAdamW):
        return
    for name, site in find_sites(model).items():
        grid, mask = twin.sites[name].grid, twin.sites[name].mask
        ages = grid.tiles(twin.states[name]["age"]).amax((1, 2))[mask]
        assert torch.equal(optimizer.block_ages(site.values), ages), f"{name}: ages"
        state = optimizer.state[site.values]
        assert_close(state["exp_avg"], grid.gather(twin.states[name]["m"], mask), f"{name}: exp_avg")
        assert_close(state["exp_avg_sq"], grid.gather(twin.states[name]["v"], mask), f"{name}: exp_avg_sq")


@pytest.mark.parametrize(
    ("block_shape", "rule_name", "grow"),
    pairwise([(1, 1), (1, 16), (16, 16)], list(RULES), ["random", "gradient"]),
    ids=str,
)
def test_compact_training_equals_the_dense_twin(block_shape: tuple[int, int], rule_name: str, grow: str) -> None:
    rule, make_optimizer = RULES[rule_name]
    model, twin = make_pair(block_shape, rule)
    optimizer = make_optimizer(model)
    manager = smet.TopologyManager(
        model,
        optimizer,
        total_steps=390,
        every=60,
        drop_fraction=0.4,
        final_drop_fraction=0.3,
        grow=grow,
        schedule="cosine",
    )
    num_changed = 0
    for step in range(300):
        inputs, target = batch(step, 50, 41, torch.float64)
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        event = manager.step()
        assert abs(loss.item() - twin.step(inputs, target)) <= TOLERANCE
        if event is not None:
            num_changed += follow(model, event, twin, grow, manager.min_age)
        if step % 50 == 0 or event is not None:
            assert_equal_to_twin(model, optimizer, twin)
    assert_equal_to_twin(model, optimizer, twin)
    assert len(manager.history) == 4 and num_changed == 4 * len(SITES_OF_RAGGED_NET)


def follow(model: nn.Module, event: smet.TopologyEvent, twin: DenseTwin, grow: str, min_age: int) -> int:
    """Takes the twin through the same update; returns how many sites changed."""
    num_changed = 0
    for name, site in find_sites(model).items():
        before = twin.sites[name].mask
        twin.change_topology(name, event.drop_fraction, site.compact.mask(), grow, event.step, min_age)
        num_dropped = int((before & ~twin.sites[name].mask).sum())
        assert event.sites[name].num_dropped == num_dropped
        num_changed += num_dropped > 0
    return num_changed
