"""Where a gradient is needed after backward, it is kept: accumulation and clipping, as eager loops do them."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.train_step.setting import MakeOptimizer, Run, active, assert_equal_runs, batch_of, sparse, twice

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


@pytest.mark.parametrize(("argument", "value"), [("accumulate", 0), ("max_grad_norm", 0.0), ("max_grad_norm", -1.0)])
def test_out_of_range(argument: str, value: float) -> None:
    model = sparse()
    with pytest.raises(ValueError, match=rf"{argument}: expected .* got {value}"):
        smet.compile_train_step(model, active(model), **{argument: value})
