"""One manager, several optimizers, and one of them steps less often, as in a GAN or with an actor and a critic."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on

BOTH = {"0.weight", "3.weight"}
pytestmark = pytest.mark.filterwarnings("ignore:.*were newcomers")
Run = tuple[nn.Module, list[torch.optim.Optimizer], smet.TopologyManager]


def begin(kind: str = "active", **options: Any) -> Run:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), density=0.4)
    halves = [list(model[0].parameters()), list(model[3].parameters())]
    if kind == "active":
        optimizers: Any = [smet.ActiveAdamW(half, lr=1e-2, model=model) for half in halves]
    else:
        optimizers = [torch.optim.AdamW(half, lr=1e-2) for half in halves]
    given = {"total_steps": 400, "every": 10, "min_age": 5} | options
    return model, optimizers, smet.TopologyManager(model, optimizers, **given)


def go(run: Run, steps: range, period: int, slower: int = 1) -> None:
    """Trains; the optimizer at the place ``slower`` steps after every ``period`` steps."""
    model, optimizers, _ = run
    for step in steps:
        loss_on(model, step).backward()
        for place, optimizer in enumerate(optimizers):
            if place != slower or step % period == period - 1:
                optimizer.step()
        model.zero_grad()


def events(run: Run) -> list[tuple[int, set[str]]]:
    return [(event.step, set(event.sites)) for event in run[2].history]


@pytest.mark.parametrize("kind", ["active", "adamw"])
@pytest.mark.parametrize("slower", [0, 1])
@pytest.mark.parametrize("period", [2, 5])
def test_the_weights_of_the_slower_one_move_too(period: int, slower: int, kind: str) -> None:
    run = begin(kind)
    go(run, range(60), period, slower)
    assert [names for _, names in events(run)] == [BOTH] * len(run[2].history)
    # Where the slower one comes first, the manager steps before the other's last step of the period.
    assert len(run[2].history) >= 5 and (slower == 0 or [step for step, _ in events(run)] == [10, 20, 30, 40, 50, 60])


@pytest.mark.parametrize("grow", ["random", "gradient", "momentum"])
def test_gradients_are_collected_in_time(grow: str) -> None:
    """The first steps show how many come together; from then on no update waits for its gradients."""
    run = begin(grow=grow)
    go(run, range(60), 5)
    assert events(run) == [(step, BOTH) for step in (10, 20, 30, 40, 50, 60)]


def test_the_slower_one_may_step_first_between_two_calls() -> None:
    model, (first, second), manager = begin(every=3, auto_step=False)
    for step in range(12):
        loss_on(model, step).backward()
        second.step()
        second.zero_grad()
        for more in range(3):
            loss_on(model, 100 + 3 * step + more).backward()
            first.step()
            first.zero_grad()
        manager.step()
    assert manager.num_steps == 36
    assert events((model, [first, second], manager)) == [(step, BOTH) for step in range(3, 37, 3)]


def test_the_slower_one_need_not_step_when_an_update_is_due() -> None:
    """Its last step before the update counts, if there was one since the update before."""
    run = begin(every=4, auto_step=False)
    model, (first, second), manager = run
    for step in range(32):
        loss_on(model, step).backward()
        first.step()
        if step < 24 and step % 12 in (1, 5):
            second.step()
        model.zero_grad()
        manager.step()
    assert events(run) == [(step, BOTH if step in (4, 8, 16, 20) else {"0.weight"}) for step in range(4, 33, 4)]


def test_a_gradient_of_the_slower_one_that_is_not_finite_postpones_the_update() -> None:
    run = begin()
    model, (first, second), _ = run
    for step in range(12):
        loss_on(model, step).backward()
        if step == 9:
            model[3].bias.grad[0] = torch.nan
        first.step()
        if step % 2:
            second.step()
        model.zero_grad()
        model[3].bias.data.nan_to_num_()
    assert events(run) == [(12, BOTH)]


def resumed_by(how: str, run: Run, fresh: Run, folder: Path) -> Run:
    if how == "deepcopy":
        return copy.deepcopy(run)
    if how == "checkpoint":
        smet.save_checkpoint(folder / "checkpoint", *run)
        smet.load_checkpoint(folder / "checkpoint", *fresh)
        return fresh
    fresh[0].load_state_dict(run[0].state_dict())
    for mine, other in zip(fresh[1], run[1], strict=True):
        mine.load_state_dict(copy.deepcopy(other.state_dict()))
    return fresh


@pytest.mark.parametrize("how", ["checkpoint", "optimizers", "deepcopy"])
@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize(("half", "slower"), [(12, 1), (14, 1), (15, 1), (24, 0)])
def test_steps_that_wait_for_the_slower_one_are_kept(
    half: int, slower: int, grow: str, how: str, tmp_path: Path
) -> None:
    whole, run = begin(grow=grow, every=5), begin(grow=grow, every=5)
    go(whole, range(40), 5, slower)
    go(run, range(half), 5, slower)
    resumed = resumed_by(how, run, begin(grow=grow, every=5), tmp_path)
    assert find_sites(resumed[0])["0.weight"].values is not find_sites(run[0])["0.weight"].values
    go(resumed, range(half, 40), 5, slower)
    assert resumed[2].num_steps == whole[2].num_steps and events(resumed) == events(whole)
    assert len(whole[2].history) > 4
    assert_same(snapshot(resumed[0]), snapshot(whole[0]))


def test_what_an_optimizer_trained_before_the_save_is_kept() -> None:
    """The first steps before the state is saved, the second after it was loaded."""
    run, fresh = begin(every=1), begin(every=1)
    loss_on(run[0], 0).backward()
    run[1][0].step()
    state = run[2].state_dict()
    assert state["new_steps"]["of"].keys() == {"0.bias", "0.parametrizations.weight.original"}
    assert state["num_steps"] == 0
    fresh[2].load_state_dict(state)
    loss_on(fresh[0], 0).backward()
    fresh[1][1].step()
    assert events(fresh) == [(1, BOTH)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"num": -1}, r"new_steps\.num: expected an integer from 0"),
        ({"num_last": 0}, r"new_steps\.num_last: expected an integer from 1"),
        ({"of": {"5.weight": 1}}, "new_steps.of: got '5.weight'"),
        ({"of": {"0.bias": {"num": 2, "last": 1, "gap": 1}}}, r"'0\.bias'\]\.num: expected an integer from 0 to 1"),
        ({"of": {"0.bias": {"num": 1, "last": 2, "gap": 1}}}, r"'0\.bias'\]\.last: expected an integer from 1 to 1"),
        ({"of": {"0.bias": {"num": 1, "last": 1, "gap": 0}}}, r"'0\.bias'\]\.gap: expected an integer from 1 to 1"),
        ({"trained": "all"}, r"new_steps\.trained: expected a list of names, got str"),
        ({"not_finite": [3]}, r"new_steps\.not_finite: expected names of parameters of the model, got 3"),
    ],
)
def test_a_bad_state_of_them_changes_nothing(broken: dict[str, Any], message: str) -> None:
    run = begin()
    go(run, range(1), 2)
    state = run[2].state_dict()
    with pytest.raises(ValueError, match=message):
        run[2].load_state_dict(state | {"new_steps": state["new_steps"] | broken})
    assert run[2].state_dict() == state
