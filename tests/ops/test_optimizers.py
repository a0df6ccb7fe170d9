"""Tests the search for optimizers inside wrappers, by the parameters that they hold."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from smet_compile.ops.optimizers import changes_nothing, find_optimizers, has_state, optimizer_that_steps, unwrapped
from tests.support.wrappers import Bag, Known, Lookahead, LookaheadInside, Proxy


@pytest.fixture
def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]


def sgd(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.1, momentum=0.9)


def names(given: Any, weights: list[nn.Parameter]) -> list[tuple[str, int, int]]:
    return [(each.name, len(each.holds), len(each.steps)) for each in find_optimizers(given, weights)]


def test_wrappers_come_before_what_they_wrap(weights: list[nn.Parameter]) -> None:
    deep = Bag(Lookahead(LookaheadInside(sgd(weights))))
    start = "Bag.pool['all'][0]"
    assert names(deep, weights) == [(start, 2, 0), (f"{start}.base", 2, 0), (f"{start}.base._base_optimizer", 2, 2)]


def test_several_and_each_once(weights: list[nn.Parameter]) -> None:
    first, second = sgd(weights[:1]), sgd(weights[1:])
    both = [("SGD", 1, 1), ("SGD", 1, 1)]
    for given in ([first, second], (first, second), {"a": first, "b": [second]}, {1: first, 2: second}.values()):
        assert names(given, weights) == both
    assert names([first, Proxy(first), second], weights) == [("SGD", 1, 1), ("Proxy", 1, 0), ("SGD", 1, 1)]
    assert names([first, second], weights[1:]) == [("SGD", 1, 1)]


def test_a_wrapper_steps_what_nothing_inside_it_holds(weights: list[nn.Parameter]) -> None:
    outer = sgd(weights)
    outer.rest = functools.partial(print, sgd(weights[1:]))  # type: ignore[attr-defined]
    assert names(outer, weights) == [("SGD", 2, 1), ("SGD.rest[1]", 1, 1)]
    assert optimizer_that_steps(outer, weights[0]) is outer
    assert optimizer_that_steps(outer, weights[1]) is outer.rest.args[0]  # type: ignore[attr-defined]


def test_one_that_knows_its_wrapper(weights: list[nn.Parameter]) -> None:
    inner = Known(sgd(weights)).inner
    assert names(inner, weights)[0] == ("SGD", 2, 2)


@pytest.mark.parametrize("given", [None, 3, "adam", [], {}, nn.Linear(2, 2), SimpleNamespace(), torch.ones(3), print])
def test_nothing_is_found_in_what_is_no_optimizer(given: Any, weights: list[nn.Parameter]) -> None:
    assert names(given, weights) == []


def test_only_wrappers_that_share_all_are_taken_off(weights: list[nn.Parameter]) -> None:
    inner = sgd(weights)
    accelerated = Accelerator(cpu=True).prepare(inner)
    assert accelerated is not inner and unwrapped(accelerated) is inner and unwrapped(Proxy(accelerated)) is inner
    assert unwrapped(inner) is inner
    ahead = Lookahead(sgd(weights))
    assert unwrapped(ahead) is ahead and unwrapped(None) is None


def test_a_step_that_only_makes_state(weights: list[nn.Parameter]) -> None:
    optimizer = sgd(weights)
    assert not has_state(optimizer)
    assert not changes_nothing(optimizer), "no gradient came, and the rate is not 0"
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    assert not changes_nothing(optimizer), "decay might change something"
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    assert changes_nothing(optimizer)
    weights[1].grad[0] = torch.nan  # type: ignore[index]
    assert not changes_nothing(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert has_state(optimizer)
