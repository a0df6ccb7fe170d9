"""A checkpoint holds the state of wrapped optimizers and of several: a resumed run equals an undisturbed one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import loss_on
from tests.support.wrappers import SAM, Bag, Bound, Lookahead, LookaheadInside, Proxy, step_in_two


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def by_layer(model: nn.Module) -> list[Any]:
    return [smet.ActiveAdamW(list(part.parameters()), lr=1e-2, model=model) for part in (model[0], model[3])]


def accelerated(model: nn.Module) -> Any:
    return Accelerator(cpu=True).prepare(smet.ActiveAdamW(model, lr=1e-2))


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "lookahead": lambda model: Lookahead(adamw(model)),
    "lookahead_of_active": lambda model: Lookahead(smet.ActiveAdamW(model, lr=1e-2)),
    "lookahead_inside": lambda model: LookaheadInside(adamw(model), k=2),
    "lookahead_inside_active": lambda model: LookaheadInside(smet.ActiveAdamW(model, lr=1e-2), k=2),
    "sam": lambda model: SAM(model.parameters(), torch.optim.AdamW, lr=1e-2),
    "bound": lambda model: Bound(adamw(model)),
    "proxy": lambda model: Proxy(adamw(model)),
    "bag": lambda model: Bag(adamw(model)),
    "by_layer": by_layer,
    "accelerate": accelerated,
}


def make(kind: str, seed: int = 0) -> tuple[nn.Module, Any, smet.TopologyManager]:
    torch.manual_seed(seed)
    model = smet.sparsify(two_layers(), 0.4)
    optimizer = WRAPPED[kind](model)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=60, every=2)


def go_on(run: tuple[nn.Module, Any, smet.TopologyManager], first: int, steps: int) -> list[float]:
    model, optimizer, manager = run
    losses = []
    for step in range(first, first + steps):
        if isinstance(optimizer, SAM):
            step_in_two(optimizer, lambda step=step: loss_on(model, step))
        else:
            loss_on(model, step).backward()
            for each in optimizer if isinstance(optimizer, list) else [optimizer]:
                each.step()
                each.zero_grad()
        manager.step()
        losses.append(loss_on(model, step).item())
        model.zero_grad()
    return losses


@pytest.mark.parametrize("kind", WRAPPED)
def test_resumed_is_undisturbed(kind: str, tmp_path: Path) -> None:
    run = make(kind)
    go_on(run, 0, 6)
    smet.save_checkpoint(tmp_path / "run", *run)
    expected = go_on(run, 6, 6)
    other = make(kind, seed=3)
    go_on(other, 0, 2)
    smet.load_checkpoint(tmp_path / "run", *other)
    assert go_on(other, 6, 6) == expected
    assert len(other[2].history) == len(run[2].history) == 6
    assert_same(snapshot(other[0]), snapshot(run[0]))


def test_a_rate_that_a_scheduler_changes_reaches_the_inner_optimizer_after_loading(tmp_path: Path) -> None:
    run = make("sam")
    go_on(run, 0, 2)
    smet.save_checkpoint(tmp_path / "run", *run)
    model, optimizer, _ = other = make("sam", seed=3)
    smet.load_checkpoint(tmp_path / "run", *other)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = find_sites(model)["0.weight"].values.detach().clone()
    step_in_two(optimizer, lambda: loss_on(model, 0))
    assert torch.equal(find_sites(model)["0.weight"].values, before)


@pytest.mark.parametrize(("saved", "loaded"), [("lookahead", "proxy"), ("proxy", "lookahead"), ("by_layer", "sam")])
def test_other_wrappers_are_refused(saved: str, loaded: str, tmp_path: Path) -> None:
    run = make(saved)
    go_on(run, 0, 2)
    smet.save_checkpoint(tmp_path / "run", *run)
    model, optimizer, manager = make(loaded)
    with Unchanged(model), pytest.raises(ValueError, match=r"expected the state of|expected .* parameters or groups"):
        smet.load_checkpoint(tmp_path / "run", model, optimizer, manager)
