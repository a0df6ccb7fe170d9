"""A step refuses what it cannot train before anything is changed, and a failure within leaves no trace."""

from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from tests.support.states import Unchanged
from tests.train_step.setting import Net, Run, active, assert_nothing_left, batch_of, sparse, twice


def test_a_model_without_compact_weights() -> None:
    model = Net()
    with pytest.raises(ValueError, match="expected a model with compact weights, got one with none; sparsify it"):
        smet.compile_train_step(model, torch.optim.AdamW(model.parameters()))


def test_an_optimizer_that_lacks_a_weight() -> None:
    model = sparse()
    with pytest.raises(ValueError, match=r"last\.weight: expected an optimizer that holds it.*after sparsify"):
        smet.compile_train_step(model, torch.optim.AdamW(model.first.parameters()))


def test_an_optimizer_of_another_model_too() -> None:
    model = sparse()
    optimizer = torch.optim.AdamW([*model.parameters(), *nn.Linear(2, 2).parameters()])
    with pytest.raises(ValueError, match="expected parameters of the model only, got 2 others"):
        smet.compile_train_step(model, optimizer)


BAD_ARGUMENTS = [
    ({"accumulate": 1.5}, "accumulate: expected a whole number of at least 1, got 1.5"),
    ({"accumulate": float("nan")}, "accumulate: expected a whole number"),
    ({"accumulate": float("inf")}, "accumulate: expected a whole number"),
    ({"accumulate": True}, "accumulate: expected a whole number"),
    ({"accumulate": 0}, "accumulate: expected a whole number of at least 1, got 0"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm: expected a finite number above 0, got nan; pass None"),
    ({"max_grad_norm": float("inf")}, "max_grad_norm: expected a finite number above 0, got inf; pass None"),
    ({"max_grad_norm": 0}, "max_grad_norm: expected a finite number above 0"),
    ({"max_grad_norm": "1"}, "max_grad_norm: expected a finite number above 0"),
    ({"loss_fn": 3}, r"loss_fn: expected a function \(model, batch\) → loss, got 3"),
    ({"model": None}, "model: expected a model"),
    ({"optimizer": None}, "optimizer: expected an optimizer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=str)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    model = sparse()
    optimizer = active(model)
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=message):
        smet.compile_train_step(**({"model": model, "optimizer": optimizer} | arguments))


def no_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).loss.detach()


def many_losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).loss * torch.ones(3)


def not_a_tensor(model: nn.Module, batch: Any) -> float:
    return 1.0


def faulty(model: nn.Module, batch: Any) -> torch.Tensor:
    raise RuntimeError("a fault of the model")


BAD_LOSSES = [
    (faulty, RuntimeError, "a fault of the model"),
    (many_losses, ValueError, r"without dimensions, got a tensor of shape \(3,\); return loss.mean\(\)"),
    (no_loss, ValueError, "expected one that depends on trained parameters, got one that needs no gradient"),
    (not_a_tensor, ValueError, "without dimensions, got float"),
]


def check_that_it_changes_nothing(loss_fn: Any, error: type, message: str, num_steps_before: int) -> None:
    """Checks that a bad loss changes nothing, and that later steps are still fused."""
    bad = False
    run, _ = twice(sparse(), grow="gradient", every=3)
    step = run.compiled(loss_fn=lambda model, batch: loss_fn(model, batch) if bad else model(**batch).loss)
    run.in_step(step, map(batch_of, range(num_steps_before)))
    bad = True
    with Unchanged(run.model, run.optimizer), pytest.raises(error, match=message):
        step(batch_of(5))
    assert_nothing_left(run.model)
    bad = False
    run.in_step(step, [batch_of(5)])
    assert step.fused


@pytest.mark.parametrize(("loss_fn", "error", "message"), BAD_LOSSES[:2])
def test_a_bad_loss_changes_nothing(loss_fn: Any, error: type, message: str) -> None:
    check_that_it_changes_nothing(loss_fn, error, message, num_steps_before=0)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("num_steps_before", [0, 2])
@pytest.mark.parametrize(("loss_fn", "error", "message"), BAD_LOSSES)
def test_nor_without_the_compiler(loss_fn: Any, error: type, message: str, num_steps_before: int) -> None:
    check_that_it_changes_nothing(loss_fn, error, message, num_steps_before)


@pytest.mark.parametrize("batch", [torch.ones(2, 12), [torch.ones(2, 12)], None], ids=lambda b: type(b).__name__)
def test_a_batch_that_is_no_dict(batch: Any) -> None:
    model = sparse()
    run = Run(model, active(model))
    step = run.compiled()
    with Unchanged(model, run.optimizer), pytest.raises(ValueError, match=r"batch: expected a dict.*pass loss_fn="):
        step(batch)
    assert_nothing_left(model)


def test_all_frozen() -> None:
    model = sparse()
    run = Run(model, active(model))
    step = run.compiled()
    model.requires_grad_(False)
    with Unchanged(model, run.optimizer), pytest.raises(ValueError, match="needs no gradient"):
        step(batch_of(0))


@pytest.mark.usefixtures("uncompiled")
def test_a_weight_that_was_replaced() -> None:
    model = sparse()
    run = Run(model, active(model))
    step = run.compiled()
    step(batch_of(0))
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(
        ValueError, match=r"first\.weight: expected an optimizer that holds it.*make the optimizer from"
    ):
        step(batch_of(1))
