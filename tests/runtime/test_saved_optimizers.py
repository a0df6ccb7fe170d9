"""State that save_checkpoint writes of any optimizer is taken; any other is refused before anything changes."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import smet_compile as smet
from smet_compile.runtime import checkpoint_file
from tests.runtime.setting import make
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import loss_on, train


class OwnParts(optim.SGD):
    """Makes a state dict of its own."""

    def state_dict(self) -> Any:
        return {"inner": super().state_dict(), "count": 3}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict["inner"])


class Own(optim.Optimizer):
    """Keeps what no optimizer of torch does: a matrix, a list, state of no parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "names": ["a", "b"], "limit": float("inf")})
        self.state["all"] = {"count": 1}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("matrix", torch.ones(3, 5)).add_(1)
                self.state[p].update(history=[torch.ones(2), 3], nothing=None, exp_avg_sq=torch.ones(2))
                p.add_(p.grad, alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "active": smet.ActiveAdamW,
    "naive": smet.NaiveAdamW,
    "adamw": lambda model: optim.AdamW(model.parameters()),
    "amsgrad": lambda model: optim.AdamW(model.parameters(), amsgrad=True, foreach=False),
    "adam, tensor lr": lambda model: optim.Adam(model.parameters(), lr=torch.tensor(1e-3), fused=True),
    "sgd": lambda model: optim.SGD(model.parameters(), 0.1),
    "momentum": lambda model: optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda model: optim.RMSprop(model.parameters(), centered=True, momentum=0.5),
    "adagrad": lambda model: optim.Adagrad(model.parameters()),
    "adadelta": lambda model: optim.Adadelta(model.parameters()),
    "adamax": lambda model: optim.Adamax(model.parameters()),
    "nadam": lambda model: optim.NAdam(model.parameters()),
    "radam": lambda model: optim.RAdam(model.parameters()),
    "asgd": lambda model: optim.ASGD(model.parameters()),
    "rprop": lambda model: optim.Rprop(model.parameters()),
    "adafactor": lambda model: optim.Adafactor(model.parameters()),
    "lbfgs": lambda model: optim.LBFGS(model.parameters()),
    "own parts": lambda model: OwnParts(model.parameters(), 0.1, momentum=0.9),
    "own": lambda model: Own(model.parameters()),
    "named": lambda model: optim.AdamW(model.named_parameters()),
    "groups": lambda model: optim.SGD([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters())], 0.1),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("trained", [False, True])
def test_what_is_saved_is_taken(name: str, trained: bool, tmp_path: Path) -> None:
    model, optimizer, _ = make(optimizer=lambda model: smet.ActiveAdamW(model))
    optimizer = OPTIMIZERS[name](model)
    model[0].bias.requires_grad_(False)  # and so has no state
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False)
    for step in range(3):
        loss_on(model, step).backward()
        model[3].bias.grad = None if step < 2 else model[3].bias.grad  # state that begins later
        if model[0].bias.grad is None and name == "own":
            model[0].bias.grad = torch.zeros_like(model[0].bias)
            model[3].bias.grad = torch.zeros_like(model[3].bias)
        optimizer.step(lambda step=step: loss_on(model, step)) if name == "lbfgs" else optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    smet.save_checkpoint(tmp_path / "a", model, optimizer, extra=scheduler.state_dict())
    saved = snapshot(model, optimizer)
    fresh, _, _ = make(optimizer=lambda model: smet.ActiveAdamW(model))
    other = OPTIMIZERS[name](fresh)
    if trained:
        fresh_loss = loss_on(fresh, 0)
        fresh_loss.backward()
        other.step(lambda: loss_on(fresh, 0)) if name == "lbfgs" else other.step()
    smet.load_checkpoint(tmp_path / "a", fresh, other)
    assert_same(snapshot(fresh, other), saved)


def test_moments_that_overflowed_are_taken(tmp_path: Path) -> None:
    model, *_ = make()
    optimizer = optim.AdamW(model.parameters())
    loss_on(model, 0).mul(float("nan")).backward()
    optimizer.step()
    smet.save_checkpoint(tmp_path / "a", model, optimizer)
    fresh, *_ = make()
    other = optim.AdamW(fresh.parameters())
    smet.load_checkpoint(tmp_path / "a", fresh, other)
    assert_same(snapshot(other), snapshot(optimizer))


def group(**options: Any) -> Callable[[Any], None]:
    return lambda state: state["param_groups"][0].update(options)


def entry(key: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def alter(state: Any) -> None:
        state["state"][COMPACT][key] = change(state["state"][COMPACT][key])

    return alter


COMPACT = 1
"""The number of a compact parameter of the model."""

COMMON: list[tuple[Callable[[Any], Any], str]] = [
    (group(lr=float("nan")), r"param_groups\[0\].lr.*nan"),
    (group(lr=float("inf")), r"param_groups\[0\].lr.*inf"),
    (group(lr=-1), "-1"),
    (group(lr="x"), "lr.*'x'"),
    (group(lr=True), "lr.*True"),
    (group(lr=2**63), "lr.*integer|lr.*number"),
    (group(lr=torch.ones(2)), "lr.*shape"),
    (group(betas=(0.9,)), r"betas.*2 values"),
    (group(betas=(2.0, 2.0)), r"2\.0|beta"),
    (group(betas=0.9), "betas"),
    (group(eps=-1e-8), "eps"),
    (group(weight_decay=-1.0), "weight_decay"),
    (lambda state: state["param_groups"][0].pop("lr"), "'lr'"),
    (lambda state: state["param_groups"].append({"lr": 1}), "1 groups, got 2"),
    (lambda state: state["param_groups"][0]["params"].pop(), "parameters, got"),
    (lambda state: state["param_groups"][0]["params"].__setitem__(1, 0), "once"),
    (lambda state: state["param_groups"][0].pop("params"), "params"),
    (lambda state: state.pop("state"), "state"),
    (lambda state: state["state"].update({99: {}}), "state"),
    (lambda state: state["state"].__setitem__(COMPACT, 3), "state"),
    (lambda state: state["state"][COMPACT].pop("step"), "step"),
    (entry("step", lambda t: t - 100), "step"),
    (entry("step", lambda t: torch.zeros(3)), "step|shape"),
    (entry("step", lambda t: 3), "step|tensors"),
    (entry("exp_avg", lambda t: t[:-1]), "exp_avg"),
    (entry("exp_avg", lambda t: t.long()), "exp_avg"),
    (entry("exp_avg_sq", lambda t: t - 1), "exp_avg_sq.*at least 0"),
]
ACTIVE: list[tuple[Callable[[Any], Any], str]] = [
    (group(warmup_steps="x"), "warmup_steps"),
    (group(warmup_steps=-1), "warmup_steps"),
    (group(initial_warmup_steps=-1), "initial_warmup_steps"),
    (group(initial_warmup_steps=None), "initial_warmup_steps"),
    (group(lr_density_exponent=float("nan")), "lr_density_exponent"),
    (group(lr_density_exponent=1e300), r"param_groups\[0\]"),
    (entry("step", lambda t: t.int()), "step"),
    (entry("step", lambda t: t + 2**60), "step"),
    (entry("num_skipped", lambda t: t - 1), "num_skipped"),
    (entry("num_skipped", lambda t: t.double()), "num_skipped"),
    (entry("births", lambda t: t.int()), "births"),
    (entry("births", lambda t: t[:1]), "births"),
    (entry("births", lambda t: t.repeat(3)), "births"),
    (entry("births", lambda t: t + 4), "births.*step"),
    (entry("births", lambda t: t - 2), "births"),
    (entry("births", lambda t: torch.full_like(t, -1)), "free"),
    (entry("generation", lambda t: t + 1), "free"),
    (entry("generation", lambda t: t.short()), "generation"),
    (entry("generation", lambda t: t.short() + 30_000), "generation"),
    (entry("generation", lambda t: t[:1]), "generation"),
    (lambda state: state["state"][COMPACT].update(more=torch.ones(1)), "more"),
]


CASES = [("active", "load_state_dict"), ("active", "load_checkpoint"), ("adamw", "load_checkpoint")]


@pytest.mark.parametrize(("kind", "through"), CASES)
def test_what_no_optimizer_has_is_refused(kind: str, through: str, tmp_path: Path) -> None:
    objects = make(optimizer=OPTIMIZERS[kind])
    train(*objects, steps=3)
    smet.save_checkpoint(tmp_path / "a", *objects)
    model, optimizer, manager = make(optimizer=OPTIMIZERS[kind])
    train(model, optimizer, steps=1)
    assert kind == "adamw" or "births" in optimizer.state_dict()["state"][COMPACT]
    for alter, match in COMMON + (ACTIVE if kind == "active" else []):
        saved = checkpoint_file.read(tmp_path / "a")
        alter(saved["optimizer"]["state"])
        checkpoint_file.write(tmp_path / "altered", saved)
        with Unchanged(model, optimizer, manager), pytest.raises(ValueError, match=match):
            if through == "load_state_dict":
                optimizer.load_state_dict(saved["optimizer"]["state"])
            else:
                smet.load_checkpoint(tmp_path / "altered", model, optimizer, manager)


def test_state_of_8_bits(tmp_path: Path) -> None:
    model = make()[0]
    optimizer = smet.ActiveAdamW(model, moment_dtype="int8")
    train(model, optimizer, steps=2)
    good = optimizer.state_dict()
    for change, match in (
        (lambda t: t - 1, "scales of at least 0"),
        (lambda t: t * float("inf"), "finite scales"),
        (lambda t: t[:1], "scales of torch.float32"),
        (lambda t: t.double(), "scales of torch.float32"),
    ):
        state = copy.deepcopy(good)
        entry("scales", change)(state)
        with Unchanged(optimizer), pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)


@pytest.mark.parametrize("missing", [[0], [3], [0, 1, 2, 3]], ids=str)
def test_state_that_is_missing(missing: list[int], tmp_path: Path) -> None:
    objects, other = make(), make()
    train(*objects, steps=2)
    smet.save_checkpoint(tmp_path / "a", *objects)
    saved = checkpoint_file.read(tmp_path / "a")
    for number in missing:
        del saved["optimizer"]["state"]["state"][number]
    checkpoint_file.write(tmp_path / "a", saved)
    with Unchanged(*other), pytest.raises(ValueError, match="some is missing"):
        smet.load_checkpoint(tmp_path / "a", *other)


def test_a_wrapper_that_shares_its_state_is_the_optimizer_in_it(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model, optimizer, _ = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    train(prepared, wrapped, steps=2)
    smet.save_checkpoint(tmp_path / "a", prepared, wrapped)
    other, plain, _ = make()
    smet.load_checkpoint(tmp_path / "a", other, plain)
    assert_same(snapshot(other, plain), snapshot(model, optimizer))
    smet.save_checkpoint(tmp_path / "a", other, plain)
    smet.load_checkpoint(tmp_path / "a", prepared, wrapped)


def test_a_model_of_no_compact_weights(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    smet.save_checkpoint(tmp_path / "a", model, optim.AdamW(model.parameters()))
    smet.load_checkpoint(tmp_path / "a", other, optim.AdamW(other.parameters()))
    assert_same(snapshot(other), snapshot(model))
