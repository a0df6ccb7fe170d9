"""Parts of a model that only some steps train, under one optimizer: tasks that take turns, layers that are left out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.tracing import Capture
from tests.support.snapshots import assert_same, snapshot

ALL = {"body.weight", "left.weight", "right.weight"}
Run = tuple[nn.Module, torch.optim.Optimizer, smet.TopologyManager]


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor, task: int) -> Tensor:
        return (self.right if task else self.left)(self.body(x).tanh())


def begin(kind: str = "active", **options: Any) -> Run:
    torch.manual_seed(0)
    model = smet.sparsify(TwoTasks(), density=0.4)
    make = smet.ActiveAdamW if kind == "active" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=1e-2, **({"model": model} if kind == "active" else {}))
    given = {"total_steps": 400, "every": 6, "min_age": 5} | options
    return model, optimizer, smet.TopologyManager(model, optimizer, **given)


def loss_of(model: nn.Module, batch: tuple[Tensor, int]) -> Tensor:
    return model(*batch).square().mean()


def go(run: Run, steps: range, fused: bool = False, set_to_none: bool = True, only: int | None = None) -> None:
    """Trains; odd steps train the right part, so that an update after an even number of steps follows one of these."""
    model, optimizer, _ = run
    if fused:
        step = smet.compile_train_step(model, optimizer, loss_of)
        step.compile(backend=Capture())
    for number in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        task = number % 2 if only is None else only
        if fused:
            step((x, task))
            assert all(p.grad is None for p in model.parameters())
        else:
            loss_of(model, (x, task)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none)


def moved(run: Run) -> list[tuple[int, set[str]]]:
    return [(event.step, {name for name, site in event.sites.items() if site.num_dropped}) for event in run[2].history]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["active", "adamw"])
def test_all_that_was_trained_since_the_last_update_moves(kind: str, set_to_none: bool) -> None:
    run = begin(kind)
    go(run, range(24), set_to_none=set_to_none)
    assert moved(run) == [(step, ALL) for step in (6, 12, 18, 24)]


@pytest.mark.parametrize("kind", ["active", "adamw"])
def test_so_it_does_where_updates_are_made_in_backward(kind: str) -> None:
    runs = [begin(kind), begin(kind)]
    for run, fused in zip(runs, (False, True), strict=True):
        torch._dynamo.reset()
        go(run, range(24), fused)
    assert moved(runs[1]) == moved(runs[0]) == [(step, ALL) for step in (6, 12, 18, 24)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["active", "adamw"])
def test_a_part_that_is_not_trained_any_more_stays(kind: str, fused: bool) -> None:
    torch._dynamo.reset()
    run = begin(kind)
    go(run, range(12), fused)
    go(run, range(12), fused, only=1)
    assert moved(run) == [(6, ALL), (12, ALL), (18, ALL - {"left.weight"}), (24, ALL - {"left.weight"})]


def test_a_part_that_was_frozen_since_it_was_trained_stays() -> None:
    run = begin()
    go(run, range(10))
    run[0].left.requires_grad_(False)
    go(run, range(11, 12))
    run[0].body.requires_grad_(False)
    go(run, range(13, 14))
    assert moved(run) == [(6, ALL), (12, {"right.weight"})]


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
def test_growth_by_gradient_needs_one_in_its_window(grow: str) -> None:
    runs = [begin(grow=grow, window=window) for window in (1, 2)]
    for run in runs:
        go(run, range(12))
    assert moved(runs[0]) == [(step, ALL - {"left.weight"}) for step in (6, 12)]
    assert moved(runs[1]) == [(step, ALL) for step in (6, 12)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["active", "adamw"])
def test_a_resumed_run_remembers_what_was_trained(kind: str, fused: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    run, other = begin(kind), begin(kind)
    go(run, range(5), fused)
    smet.save_checkpoint(tmp_path / "checkpoint", *run)
    twin = copy.deepcopy(run) if not fused else None
    go(run, range(5, 12), fused)
    torch._dynamo.reset()
    smet.load_checkpoint(tmp_path / "checkpoint", *other)
    for resumed in (other, twin):
        if resumed is not None:
            go(resumed, range(5, 12), fused)
            assert moved(resumed) == moved(run) == [(6, ALL), (12, ALL)]
            assert_same(snapshot(*resumed), snapshot(*run))
