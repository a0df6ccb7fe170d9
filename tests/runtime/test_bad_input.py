"""Wrong requests to the manager are refused at construction, with the fix in the message."""

from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.states import Unchanged
from tests.support.training import loss_on


def make(density: float = 0.5) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = smet.sparsify(two_layers(), density=density)
    return model, smet.ActiveAdamW(model)


@pytest.mark.parametrize(("density", "largest"), [(0.9, "0.1[01]"), (0.95, "0.05")])
def test_an_impossible_drop_fraction_says_the_largest_possible(density: float, largest: str) -> None:
    model, optimizer = make(density)
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=rf"weight.*{largest}"):
        smet.TopologyManager(model, optimizer, total_steps=100)


def test_the_largest_possible_is_possible() -> None:
    model, optimizer = make(0.8)
    smet.TopologyManager(model, optimizer, total_steps=100, drop_fraction=0.25)
    with pytest.raises(ValueError, match=r"0\.25"):
        smet.TopologyManager(model, optimizer, total_steps=100, drop_fraction=0.28)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("total_steps", 0),
        ("every", 0),
        ("every", -5),
        ("drop_fraction", -0.1),
        ("drop_fraction", 1.5),
        ("final_drop_fraction", -0.1),
        ("final_drop_fraction", 1.5),
        ("stop_fraction", -0.1),
        ("stop_fraction", 1.1),
        ("grow", "gradients"),
        ("schedule", "cosin"),
        ("total_steps", 10.0),
        ("total_steps", float("inf")),
        ("total_steps", True),
        ("total_steps", 10**30),
        ("every", 1.5),
        ("every", float("nan")),
        ("every", None),
        ("stop_fraction", float("nan")),
        ("drop_fraction", "0.2"),
        ("drop_fraction", 1.0),
        ("grow", ["random"]),
        ("schedule", 3),
        ("seed", float("nan")),
        ("seed", None),
        ("model", None),
        ("optimizer", None),
    ],
    ids=str,
)
def test_options_out_of_range(option: str, value: Any) -> None:
    model, optimizer = make()
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=option):
        smet.TopologyManager(**({"model": model, "optimizer": optimizer, "total_steps": 100} | {option: value}))


def test_an_optimizer_that_does_not_hold_the_values() -> None:
    model, _ = make()
    other = torch.optim.SGD(two_layers().parameters(), lr=0.1)
    with Unchanged(model), pytest.raises(ValueError, match=r"optimizer.*0\.weight|0\.weight.*optimizer"):
        smet.TopologyManager(model, other, total_steps=100)


def test_an_optimizer_that_holds_only_some_of_the_values() -> None:
    model, _ = make()
    some = torch.optim.SGD([find_sites(model)["0.weight"].values], lr=0.1)
    with Unchanged(model), pytest.raises(ValueError, match=r"3\.weight"):
        smet.TopologyManager(model, some, total_steps=100)


def test_values_assigned_after_the_optimizer_was_made() -> None:
    """load_state_dict(assign=True) makes new parameters: the optimizer holds the old ones."""
    model, optimizer = make()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="optimizer"):
        smet.TopologyManager(model, optimizer, total_steps=100)


def test_a_model_without_sites() -> None:
    model = two_layers()
    with pytest.raises(ValueError, match=r"(?i)sparsify|no compact|no site"):
        smet.TopologyManager(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=100)


class NamedState(torch.optim.SGD):
    """Keeps a state of another shape than the values."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row_mean"] = p.detach().new_zeros(3)


@pytest.mark.parametrize(
    ("make_optimizer", "named"),
    [
        (lambda m: NamedState(m.parameters(), lr=0.1), "row_mean"),
        (lambda m: torch.optim.Adafactor(m.parameters()), r"(?i)adafactor|row_var|variance"),
        (lambda m: torch.optim.LBFGS(m.parameters()), r"(?i)lbfgs"),
        (lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2]), r"(?i)muon"),
    ],
    ids=["named_state", "adafactor", "lbfgs", "muon"],
)
def test_an_optimizer_that_is_not_elementwise_is_refused_by_name(make_optimizer: Any, named: str) -> None:
    """At construction, or at the latest when the update meets the state; nothing is half changed."""
    model = smet.sparsify(nn.Sequential(nn.Linear(12, 7)), density=0.5, block_shape=(1, 3))
    if "muon" in named:
        model = smet.sparsify(nn.Sequential(nn.Linear(12, 7, bias=False)), density=0.5)
    try:
        optimizer = make_optimizer(model)
    except ValueError:
        return
    with pytest.raises(ValueError, match=named):
        manager = smet.TopologyManager(model, optimizer, auto_step=False, total_steps=100, every=1)
        loss_on(model, 0).backward()
        optimizer.step(lambda: loss_on(model, 0)) if "lbfgs" in named else optimizer.step()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        try:
            manager.step()
        finally:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
