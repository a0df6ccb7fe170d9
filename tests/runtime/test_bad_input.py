"""Wrong requests to the manager are refused at construction, with the fix in the message."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


class Coded(Tensor):
    """Stands for a state that is stored in another form than its shape says, as torchao's 8-bit state is."""


class CodedState(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("exp_avg", torch.zeros_like(p.detach()).as_subclass(Coded))


def of_torchao(model: nn.Module) -> Any:
    return pytest.importorskip("torchao.optim").AdamW8bit(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("make_optimizer", [lambda model: CodedState(model.parameters(), lr=0.1), of_torchao])
def test_a_state_that_is_no_plain_tensor_is_refused(make_optimizer: Any, is_used: bool) -> None:
    """The manager refuses it when it is made, or before its first update; nothing is half changed."""
    model = smet.sparsify(nn.Linear(128, 128), density=0.5)
    optimizer = make_optimizer(model)

    def step() -> None:
        model(torch.ones(2, 128)).sum().backward()
        optimizer.step()

    before = model.parametrizations.weight[0].mask()
    if is_used:
        step()
    with pytest.raises(ValueError, match=r"weight: .* keeps a state 'exp_avg' of type (Coded|OptimState8bit)"):
        smet.TopologyManager(model, optimizer, total_steps=100, every=3)
        for _ in range(3):
            step()
    assert torch.equal(model.parametrizations.weight[0].mask(), before)


@pytest.mark.parametrize("options", [{}, {"grow": "gradient"}, {"density_schedule": [(6, 0.25)]}], ids=str)
def test_a_layer_that_is_taken_out_keeps_its_topology(options: Any) -> None:
    model = smet.sparsify(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), density=0.5)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=2, min_age=0, **options)
    removed = model[1]
    before = removed.parametrizations.weight[0].mask()

    def train_on(steps: int) -> None:
        for _ in range(steps):
            model(torch.ones(2, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train_on(1)
    del model[1]
    with pytest.warns(UserWarning, match=r"TopologyManager: 1\.weight: no longer in the model, so its topology stays"):
        train_on(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_on(1)
        copied = copy.deepcopy((model, optimizer, manager))[2]
    assert not [each for each in caught if "no longer" in str(each.message)]
    assert [list(event.sites) for event in manager.history] == 2 * [["0.weight", "2.weight"]]
    assert torch.equal(removed.parametrizations.weight[0].mask(), before)
    copied.load_state_dict(manager.state_dict())
    train_on(4)
    assert len(manager.history) == 4


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
