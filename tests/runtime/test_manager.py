"""Drop, grow, postpone, remember."""

import gc
import json
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.runtime.setting import make
from tests.support.blocks import Grid
from tests.support.masked import masks_of
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on, train


@pytest.mark.parametrize("block_shape", [(1, 1), (4, 4)], ids=str)
def test_drops_the_smallest_blocks_and_grows_none_of_them(block_shape: tuple[int, int]) -> None:
    """Edge blocks count by the mean over what lies inside."""
    model, optimizer, manager = make(block_shape=block_shape, every=1, drop_fraction=0.5)
    train(model, optimizer, steps=1)
    weights = {name: model.get_submodule(name[0]).weight.detach() for name in find_sites(model)}
    before = masks_of(model)
    manager.step()
    for name, after in masks_of(model).items():
        dropped, grown = before[name] & ~after, after & ~before[name]
        scores = Grid(tuple(weights[name].shape), block_shape).mean(weights[name].double().abs())
        assert int(dropped.sum()) == int(grown.sum()) > 0
        assert scores[dropped].max() <= scores[before[name] & after].min()


def test_may_be_called_before_or_after_zero_grad() -> None:
    results = []
    for zero_first in (True, False):
        torch.manual_seed(0)
        model, optimizer, manager = make(every=2, grow="gradient")
        for step in range(6):
            loss_on(model, step).backward()
            optimizer.step()
            if zero_first:
                optimizer.zero_grad()
            manager.step()
            optimizer.zero_grad()
        assert len(manager.history) == 3
        results.append(snapshot(model, optimizer))
    assert_same(results[0], results[1])


def test_random_growth_is_a_function_of_the_seed() -> None:
    def run(seed: int) -> list[object]:
        torch.manual_seed(0)
        model, optimizer, manager = make(seed=seed)
        torch.manual_seed(torch.seed())
        train(model, optimizer, manager, steps=6)
        return snapshot(model)

    assert_same(run(1), run(1))
    with pytest.raises(AssertionError):
        assert_same(run(1), run(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "bias"])
def test_a_gradient_that_is_not_finite_postpones_the_update(bad: float, where: str) -> None:
    model, optimizer, manager = make(every=3)
    train(model, optimizer, manager, steps=2)
    before = masks_of(model)
    for step in (2, 3):
        loss_on(model, step).backward()
        target = find_sites(model)["0.weight"].values if where == "0.weight" else model[3].bias
        target.grad[0] = bad
        optimizer.step()
        optimizer.zero_grad()
        assert manager.step() is None
    assert_same(masks_of(model), before)
    train(model, optimizer, manager, first=4)
    assert [event.step for event in manager.history] == [5]
    train(model, optimizer, manager, first=5)
    assert [event.step for event in manager.history] == [5, 6]


def test_gradients_made_in_a_closure_are_looked_at_too() -> None:
    model, optimizer, manager = make(every=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_on(model, 0)
        loss.backward()
        model[0].bias.grad[0] = bad
        return loss

    for bad in (0.0, torch.nan, 0.0):  # noqa: B007  (the closure reads it)
        optimizer.step(closure)
        manager.step()
    assert [event.step for event in manager.history] == [1, 3]


def test_a_step_the_scaler_skips_postpones_the_update() -> None:
    model, optimizer, manager = make(every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    events = []
    for step in range(3):
        loss = loss_on(model, step)
        scaler.scale(loss * torch.inf if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        events.append(manager.step())
    assert events[:2] == [None, None] and events[2] is not None


def test_history_by_hand() -> None:
    model, optimizer, manager = make(every=2, drop_fraction=0.2, schedule="constant")
    ever = masks_of(model)
    grown_before: dict[str, Tensor] = {}
    for update in range(4):
        train(model, optimizer, manager, first=2 * update, steps=1)
        before = masks_of(model)
        train(model, optimizer, manager, first=2 * update + 1, steps=1)
        event, after = manager.history[-1], masks_of(model)
        for name, site in event.sites.items():
            assert site.num_active == int(after[name].sum())
            assert site.num_dropped == int((before[name] & ~after[name]).sum())
            assert site.churn_fraction == pytest.approx(site.num_dropped / site.num_active)
            ever[name] |= after[name]
            assert site.explored_fraction == pytest.approx(ever[name].float().mean().item())
            if update == 0:
                assert site.grown_survival_fraction is None
            else:
                alive = after[name][grown_before[name]].float().mean().item()
                assert site.grown_survival_fraction == pytest.approx(alive)
            assert site.mean_age is not None and 0 <= site.mean_age <= event.step
            grown_before[name] = after[name] & ~before[name]
        assert event.num_dropped == sum(s.num_dropped for s in event.sites.values())
        total = sum(s.num_active for s in event.sites.values())
        assert event.churn_fraction == pytest.approx(event.num_dropped / total)
    assert json.loads(json.dumps([event.to_dict() for event in manager.history]))


def test_no_ages_where_the_optimizer_keeps_none() -> None:
    sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
    model, optimizer, manager = make(optimizer=sgd)
    train(model, optimizer, manager, steps=3)
    assert {site.mean_age for site in manager.history[0].sites.values()} == {None}


def test_history_is_saved() -> None:
    model, optimizer, manager = make()
    train(model, optimizer, manager, steps=7)
    other = make()[2]
    other.load_state_dict(manager.state_dict())
    assert other.num_steps == 7 and other.next_update == manager.next_update == 9
    assert [e.to_dict() for e in other.history] == [e.to_dict() for e in manager.history]


def test_steps_taken_before_a_load_are_forgotten() -> None:
    model, optimizer, manager = make()
    train(model, optimizer, manager, steps=4)
    state = manager.state_dict()
    other_model, other_optimizer, other = make()
    train(other_model, other_optimizer, steps=2)
    other.load_state_dict(state)
    assert other.step() is None and other.num_steps == 4


def test_frozen_sites_keep_their_topology() -> None:
    model, _, _ = make()
    find_sites(model)["0.weight"].values.requires_grad_(False)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=2)
    before = masks_of(model)
    train(model, optimizer, manager, steps=2)
    after = masks_of(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["3.weight"], before["3.weight"])


def test_a_manager_of_a_part_of_the_model_touches_only_that_part() -> None:
    model, optimizer, _ = make()
    inner = nn.ModuleDict({"part": model[0]})
    manager = smet.TopologyManager(inner, optimizer, total_steps=100, every=2)
    before = masks_of(model)
    train(model, optimizer, manager, steps=2)
    assert len(manager.history) == 1
    assert torch.equal(masks_of(model)["3.weight"], before["3.weight"])


def test_called_every_third_optimizer_step() -> None:
    """Steps are the optimizer's; an update comes at the first call at or after the step it is due."""
    model, optimizer, manager = make(every=4)
    for call in range(1, 5):
        train(model, optimizer, first=3 * call, steps=3)
        manager.step()
        assert manager.num_steps == 3 * call
    assert [event.step for event in manager.history] == [6, 9, 12]
    assert manager.next_update == 16


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_a_manager_that_nobody_holds_is_gone(grow: str) -> None:
    model, optimizer, manager = make(every=1, grow=grow)
    train(model, optimizer, manager, steps=2)
    before, gone = masks_of(model), weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None
    assert all(site.compact.collected is None for site in find_sites(model).values())
    train(model, optimizer, first=2, steps=2)
    assert_same(masks_of(model), before)


def train_with_nan(
    model: nn.Module, optimizer: torch.optim.Optimizer, manager: smet.TopologyManager, first: int, steps: int
) -> None:
    for step in range(first, first + steps):
        loss_on(model, step).backward()
        model[3].bias.grad[0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        assert manager.step() is None


def test_an_update_postponed_ten_times_is_left_out() -> None:
    model, optimizer, manager = make(every=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_with_nan(model, optimizer, manager, first=0, steps=11)
    with pytest.warns(UserWarning, match=r"3\.bias is not finite.*after step 15") as caught:
        train_with_nan(model, optimizer, manager, first=11, steps=1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, manager, first=12, steps=6)
    assert [event.step for event in manager.history] == [15, 18]
