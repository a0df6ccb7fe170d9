"""The update in backward is the one that the optimizer makes: every optimizer and option that a step takes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import smet_compile as smet
from tests.train_step.setting import MakeOptimizer, Output, active, assert_equal_runs, batch_of, sparse, twice

NUM_STEPS = 25
FP32 = torch.tensor(1e-2)
FP64 = torch.tensor(1e-2, dtype=torch.float64)


class Layers(nn.Module):
    """Has a layer for each of some parameter groups, and a norm."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(num)])
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return Output((self.norm(x)[:, :7] - y).square().mean())


def in_groups(kind: Any, layers: list[dict[str, Any]], **common: Any) -> tuple[int, MakeOptimizer]:
    """Returns the number of layers, and an optimizer that trains each by its own options."""

    def make(model: Any) -> Optimizer:
        groups = [{"params": [*x.parameters()], **y} for x, y in zip(model.layers, layers, strict=True)]
        known = {"model": model} if issubclass(kind, smet.ActiveAdamW) else {}
        return kind([*groups, {"params": [*model.norm.parameters()]}], **{"lr": 1e-2, **common, **known})

    return len(layers), make


OPTIMIZERS: dict[str, tuple[int, MakeOptimizer]] = {
    "active_adamw": in_groups(
        smet.ActiveAdamW,
        [
            {"warmup_steps": 5, "initial_warmup_steps": 9, "weight_decay": 0.1},
            {"warmup_steps": 0, "lr_density_exponent": 0.5},
            {"betas": (0.8, 0.9), "eps": 1e-4},
            {"lr": FP32},
            {"lr": 0.0, "weight_decay": 0.1},
        ],
    ),
    "naive_adamw": in_groups(smet.NaiveAdamW, [{"weight_decay": 0.1}, {"warmup_steps": 5}]),
    "adamw": in_groups(
        AdamW,
        [
            {"weight_decay": 0.1},
            {"amsgrad": True, "betas": (0.5, 0.6)},
            {"maximize": True},
            {"fused": True},
            {"fused": True, "amsgrad": True, "maximize": True},
            {"foreach": True, "eps": 1e-4},
            {"lr": FP64},
            {"lr": FP32},
            {"lr": FP32, "fused": True},
        ],
    ),
    "adam": in_groups(
        Adam,
        [{"weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}, {"amsgrad": True}, {"lr": FP32}],
    ),
    "sgd": in_groups(
        SGD,
        [
            {},
            {"weight_decay": 0.1},
            {"momentum": 0.9, "dampening": 0.3},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"momentum": 0.9, "maximize": True},
            {"momentum": 0.9, "dampening": 0.3, "fused": True},
            {"momentum": 0.5, "lr": FP32},
        ],
    ),
    "active_adamw_decay_groups": (1, lambda model: smet.ActiveAdamW(smet.decay_groups(model, 0.1), 1e-2, model=model)),
    "adamw_decay_groups": (1, lambda model: AdamW(smet.decay_groups(model, 0.1), lr=1e-2)),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_the_loop(name: str) -> None:
    num_layers, make = OPTIMIZERS[name]
    block_shape = (1, 4) if "groups" in name else 1
    step_run, loop_run = twice(sparse(lambda: Layers(num_layers), block_shape), make)
    step = step_run.compiled()
    assert step.fused
    step_run.in_step(step, map(batch_of, range(NUM_STEPS)))
    loop_run.in_loop(map(batch_of, range(NUM_STEPS)))
    assert_equal_runs(step_run, loop_run)


@pytest.mark.parametrize(
    "make", [active, lambda model: SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.3)], ids=["active", "sgd"]
)
@pytest.mark.usefixtures("uncompiled")
def test_goes_on_where_a_loop_stopped(make: MakeOptimizer) -> None:
    """Moments, ages, momentum: the step takes the optimizer as it finds it, and leaves it as the loop would."""
    step_run, loop_run = twice(sparse(), make)
    step_run.in_loop(map(batch_of, range(5)))
    step_run.in_step(step_run.compiled(), map(batch_of, range(5, 10)))
    step_run.in_loop(map(batch_of, range(10, 15)))
    loop_run.in_loop(map(batch_of, range(15)))
    assert_equal_runs(step_run, loop_run)


@pytest.mark.usefixtures("uncompiled")
def test_momentum_that_begins_later_begins_with_a_gradient() -> None:
    step_run, loop_run = twice(sparse(), lambda model: SGD(model.parameters(), 0.1, dampening=0.3))
    step = step_run.compiled()
    for first in (0, 3):
        for run in (step_run, loop_run):
            run.optimizer.param_groups[0]["momentum"] = 0.9 if first else 0
        step_run.in_step(step, map(batch_of, range(first, first + 3)))
        loop_run.in_loop(map(batch_of, range(first, first + 3)))
    assert_equal_runs(step_run, loop_run)


def test_what_torch_alone_can_do_is_left_to_torch() -> None:
    model = sparse()
    for options in ({"differentiable": True}, {"capturable": True}):
        assert not smet.compile_train_step(model, AdamW(model.parameters(), **options)).fused


@pytest.mark.parametrize(
    "kind", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam], ids=lambda k: k.__name__
)
def test_others_are_refused(kind: Any) -> None:
    model = sparse()
    with pytest.raises(
        ValueError, match=rf"expected an active optimizer .* or AdamW, Adam or SGD.*got torch.*{kind.__name__}"
    ):
        smet.compile_train_step(model, kind(model.parameters()))


def test_a_subclass_may_do_anything_and_is_refused() -> None:
    class Other(AdamW):
        pass

    model = sparse()
    with pytest.raises(ValueError, match=r"expected an active optimizer.*got .*Other"):
        smet.compile_train_step(model, Other(model.parameters()))
