"""Newcomers are protected until ``min_age``, and events say how many are dropped as soon as they can be."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.runtime.advice import warn_of_newcomers
from tests.runtime.setting import make
from tests.support.masked import masks_of
from tests.support.training import train

NAMES = ("0.weight", "3.weight")


def follow(steps: int, **options: Any) -> Iterator[tuple[smet.TopologyEvent, dict[str, Tensor], dict[str, Tensor]]]:
    """Yields each event with the masks before and after."""
    model, optimizer, manager = make(**options)
    for step in range(steps):
        before = masks_of(model)
        train(model, optimizer, manager, first=step, steps=1)
        if manager.history and manager.history[-1].step == step + 1:
            yield manager.history[-1], before, masks_of(model)


@pytest.mark.filterwarnings("ignore:TopologyManager")
@pytest.mark.parametrize("block_shape", [1, (1, 4), 4], ids=str)
@pytest.mark.parametrize("min_age", [0, 3, 4, 6, 9])
def test_no_block_younger_than_the_least_age_is_dropped(min_age: int, block_shape: Any) -> None:
    grown_at: dict[str, Tensor] = {}
    youngest = 10**6
    for event, before, after in follow(30, min_age=min_age, block_shape=block_shape, schedule="constant"):
        for name in NAMES:
            born = grown_at.setdefault(name, torch.full(before[name].shape, -(10**6)))
            ages = (event.step - born)[before[name] & ~after[name]]
            youngest = min([youngest, *ages.tolist()])
            born[after[name] & ~before[name]] = event.step
    assert youngest == max(3, -(-min_age // 3) * 3)  # updates come every 3 steps, and many newcomers go at once


@pytest.mark.filterwarnings("ignore:TopologyManager")
@pytest.mark.parametrize("min_age", [0, 6])
def test_events_count_newcomers_survivors_and_movement(min_age: int) -> None:
    grown: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    first: dict[str, Tensor] = {}
    for event, before, after in follow(21, min_age=min_age, drop="random"):
        for name, site in event.sites.items():
            first.setdefault(name, before[name])
            dropped, generations = before[name] & ~after[name], grown[name]
            judged = generations[-1:] if min_age == 0 else generations[-2:-1]
            assert site.num_newcomers_dropped == sum(int((dropped & each).sum()) for each in judged)
            last, earlier = ([torch.zeros_like(dropped)] * 2 + generations)[:-3:-1]
            assert (site.num_grown, site.num_surviving) == (int(last.sum()), int((last & after[name]).sum()))
            assert site.num_surviving_earlier == int((earlier & after[name]).sum())
            assert site.num_grown_earlier == int(earlier.sum())
            assert site.num_moved == int((after[name] & ~first[name]).sum())
            generations.append(after[name] & ~before[name])
        total = event.total
        assert total.num_newcomers_dropped == sum(site.num_newcomers_dropped for site in event.sites.values())
        assert total.newcomer_fraction == total.num_newcomers_dropped / total.num_dropped
        assert total.moved_fraction == total.num_moved / total.num_active
    assert total.num_newcomers_dropped > 0 and total.num_surviving_earlier > 0


def test_nearly_all_that_is_dropped_is_new_warns_once() -> None:
    model, optimizer, manager = make(min_age=0)
    with pytest.warns(UserWarning, match=r"of 38 blocks.*newcomers.*min_age \(now 0 steps\)") as caught:
        train(model, optimizer, manager, steps=30)
    assert len(caught) == 1


def test_that_warning_names_the_line_of_the_users_step() -> None:
    model, x = smet.sparsify(nn.Linear(12, 20), 0.3), torch.randn(4, 12)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    smet.TopologyManager(model, optimizer, total_steps=1000, every=1, min_age=0, drop_fraction=0.3)  # steps by itself
    with pytest.warns(UserWarning, match="were newcomers") as caught:
        for _ in range(30):
            model(x).square().sum().backward()
            optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(("num_newcomers", "warns"), [(0, False), (80, False), (89, False), (90, True), (100, True)])
def test_newcomers_that_go_again_warn_where_they_are_nearly_all(num_newcomers: int, warns: bool) -> None:
    event, _, _ = next(follow(30))
    site = dataclasses.replace(event.sites[NAMES[0]], num_dropped=100, num_newcomers_dropped=num_newcomers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert warn_of_newcomers(dataclasses.replace(event, sites={NAMES[0]: site}), min_age=6) is warns
    assert len(caught) == warns


def test_an_update_may_find_fewer_blocks_than_it_asks_for() -> None:
    """Half of the blocks are protected, and a third is asked for; the shares of one update may overlap the next."""
    ages = [0, 0]
    for event, _, _ in follow(40, drop_fraction=0.33, schedule="constant", min_age=9, every=3, density=0.4):
        assert 0 < event.num_dropped <= 0.34 * event.num_active
        ages.append(event.step)
    assert len(ages) > 10


@pytest.mark.parametrize(("min_age", "longest"), [(7, 6), (100, 6)])
def test_an_age_that_leaves_nothing_to_drop(min_age: int, longest: int) -> None:
    with pytest.raises(ValueError, match=rf"min_age: expected at most {longest} steps, got {min_age}.*too few"):
        make(drop_fraction=0.5, density=0.4, min_age=min_age)
    assert make(drop_fraction=0.5, density=0.4, min_age=longest)[2].min_age == longest


@pytest.mark.parametrize(("fraction", "expected"), [(0.2, 6), (1 / 3, 6), (0.4, 3), (0.5, 3), (0.6, 3)])
def test_two_updates_are_the_default_where_enough_is_left_to_choose_from(fraction: float, expected: int) -> None:
    assert make(drop_fraction=fraction, density=0.3)[2].min_age == expected


@pytest.mark.parametrize("value", [-1, 1.5, "6", True])
def test_bad_ages(value: Any) -> None:
    with pytest.raises(ValueError, match="min_age: expected a whole number"):
        make(min_age=value)


def test_steps_without_a_call_of_the_manager_warn() -> None:
    model, optimizer, _manager = make(every=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps=5)
    with pytest.warns(UserWarning, match=r"6 steps and manager.step\(\) was never called"):
        train(model, optimizer, first=5, steps=3)


def test_torch_optimizers_have_protected_newcomers_too() -> None:
    """The manager itself remembers what it grew."""
    model = smet.sparsify(nn.Sequential(nn.Linear(20, 20)), density=0.4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    manager = smet.TopologyManager(
        model, optimizer, auto_step=False, total_steps=100, every=1, min_age=2, schedule="constant"
    )
    for _ in range(5):
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert [event.total.num_surviving == event.total.num_grown for event in manager.history] == [True] * 5
