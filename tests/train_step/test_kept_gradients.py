"""Where a gradient is needed after backward, it is kept: accumulation and clipping, as eager loops do them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.train_step.setting import (
    Batch,
    MakeOptimizer,
    Output,
    Run,
    active,
    assert_equal_runs,
    batch_of,
    sparse,
    twice,
)

NUM_CALLS = 18


def loop(run: Run, accumulate: int, max_grad_norm: float | None) -> None:
    for call in range(NUM_CALLS):
        loss = run.model(**batch_of(call)).loss
        (loss / accumulate).backward()
        run.losses.append(loss.item())
        if (call + 1) % accumulate == 0:
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.after_update()


def momentum_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-1, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("make_optimizer", "accumulate", "max_grad_norm"), [(active, 3, None), (adamw, 2, 0.05), (active, 1, 0.05)]
)
def test_equals_the_loop(make_optimizer: MakeOptimizer, accumulate: int, max_grad_norm: float | None) -> None:
    step_run, loop_run = twice(sparse(), make_optimizer, grow="gradient", every=2)
    step = step_run.compiled(accumulate=accumulate, max_grad_norm=max_grad_norm)
    assert not step.fused
    step_run.in_step(step, map(batch_of, range(NUM_CALLS)))
    loop(loop_run, accumulate, max_grad_norm)
    assert_equal_runs(step_run, loop_run)
    assert loop_run.manager is not None and loop_run.manager.num_steps == NUM_CALLS // accumulate


@pytest.mark.usefixtures("uncompiled")
def test_a_gradient_is_as_large_as_its_values() -> None:
    model = sparse()
    run = Run(model, active(model))
    step = run.compiled(max_grad_norm=1.0)
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(site.values.grad.shape == site.values.shape for site in find_sites(model).values())
    )
    run.in_step(step, map(batch_of, range(2)))
    assert seen == [True] * 4


def clamp_gradients(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))


def halve_after_accumulation(run: Run) -> None:
    def halve(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        parameter.grad.div_(2)

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(halve)


def clip_before_the_step(run: Run) -> None:
    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)

    run.optimizer.register_step_pre_hook(clip)


@pytest.mark.parametrize("make_optimizer", [active, momentum_sgd])
@pytest.mark.parametrize("add_hooks", [clamp_gradients, halve_after_accumulation, clip_before_the_step])
def test_hooks_see_and_change_every_gradient(make_optimizer: MakeOptimizer, add_hooks: Callable[[Run], None]) -> None:
    step_run, loop_run = twice(sparse(), make_optimizer)
    for run in (step_run, loop_run):
        add_hooks(run)
    step = step_run.compiled()
    assert not step.fused
    step_run.in_step(step, map(batch_of, range(4)))
    loop_run.in_loop(map(batch_of, range(4)))
    assert_equal_runs(step_run, loop_run)
    not_fused = smet.explain(step, batch_of(0))
    assert not not_fused.updates_fused and f"{add_hooks.__name__}.<locals>" in str(not_fused)


def test_a_hook_on_one_parameter_keeps_no_other_gradient() -> None:
    step_run, loop_run = twice(sparse())
    for run in (step_run, loop_run):
        site = find_sites(run.model)["last.weight"]
        site.values.register_hook(lambda grad: 3 * grad)
    step = step_run.compiled()
    step_run.in_step(step, map(batch_of, range(4)))
    loop_run.in_loop(map(batch_of, range(4)))
    assert_equal_runs(step_run, loop_run)
    explanation = smet.explain(step, batch_of(0))
    assert step.fused and list(explanation.not_fused) == ["last.weight"]
    assert "<lambda> on the parameter may read or change its gradient" in explanation.not_fused["last.weight"][0]


@pytest.mark.usefixtures("uncompiled")
def test_hooks_of_the_library_itself_and_of_all_optimizers_keep_nothing() -> None:
    run = twice(sparse(), momentum_sgd, grow="gradient")[0]
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert run.compiled().fused and run.optimizer._optimizer_step_pre_hooks
    finally:
        handle.remove()


@pytest.mark.parametrize(("argument", "value"), [("accumulate", 0), ("max_grad_norm", 0.0), ("max_grad_norm", -1.0)])
def test_out_of_range(argument: str, value: float) -> None:
    model = sparse()
    with pytest.raises(ValueError, match=rf"{argument}: expected .* got {value}"):
        smet.compile_train_step(model, active(model), **{argument: value})


def penalty(model: Any, batch: Batch) -> Tensor:
    return model(**batch).loss + 0.1 * sum(p.abs().sum() for p in model.parameters())


def with_a_teacher_of_the_same_modules(model: Any, batch: Batch) -> Tensor:
    """Distils from other weights in the same modules, through which the gradient of the first layer goes as well."""
    hidden = model.hidden(batch["x"])
    average = {name: 0.9 * p.detach() for name, p in model.named_parameters()}
    teacher = {name: torch.full_like(p, 0.01).requires_grad_(False) for name, p in model.named_parameters()}
    loss = functional_call(model, average, (hidden[:, :12], batch["y"])).loss
    return (
        model.last(hidden).square().mean() + loss + functional_call(model, teacher, (hidden[:, :12], batch["y"])).loss
    )


def with_other_weights(model: Any, batch: Batch) -> Tensor:
    teacher = {name: torch.full_like(p, 0.01) for name, p in model.named_parameters()}
    hidden = model.hidden(batch["x"])
    return model.last(hidden).square().mean() + functional_call(model, teacher, (hidden[:, :12], batch["y"])).loss


def with_half_of_each_weight(model: Any, batch: Batch) -> Tensor:
    halves = {name: p * 0.5 for name, p in model.named_parameters()}
    return functional_call(model, halves, (batch["x"], batch["y"])).loss


def in_one_weight(model: Any, batch: Batch) -> Tensor:
    return model(**batch).loss + model.last.parametrizations.weight.original.square().sum()


@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("make_optimizer", [active, momentum_sgd])
@pytest.mark.parametrize(
    ("loss_fn", "kept"),
    [
        (penalty, ["first.weight", "last.weight"]),
        (with_a_teacher_of_the_same_modules, ["first.weight", "last.weight"]),
        (with_other_weights, []),
        (with_half_of_each_weight, ["first.weight", "last.weight"]),
        (in_one_weight, ["last.weight"]),
    ],
)
def test_a_loss_that_uses_parameters_themselves(
    loss_fn: Any, kept: list[str], make_optimizer: MakeOptimizer, is_compiled: bool
) -> None:
    """Gradients beside those of reads count, and those of reads of other weights do not."""
    step_run, loop_run = twice(sparse(), make_optimizer)
    step = step_run.compiled(loss_fn=loss_fn)
    with torch.compiler.set_stance("default" if is_compiled else "force_eager"):
        step_run.in_step(step, map(batch_of, range(4)))
    assert step.fused
    loop_run.in_loop(map(batch_of, range(4)), lambda **batch: Output(loss_fn(loop_run.model, batch)))
    assert_equal_runs(step_run, loop_run)
    if is_compiled:
        not_fused = smet.explain(step, batch_of(0)).not_fused
        reasons = {
            name: reason for name, each in not_fused.items() for reason in each if "uses the parameter" in reason
        }
        assert list(reasons) == kept
