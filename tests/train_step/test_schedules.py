"""Learning rates change during a run without a recompile, other options with one."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import smet_compile as smet
from tests.train_step.setting import active, assert_equal_runs, batch_of, sparse, twice

NUM_STEPS = 20
OPTIMIZERS: dict[str, Any] = {
    "active": active,
    "adamw": lambda model: AdamW(model.parameters(), 1e-2),
    "sgd": lambda model: SGD(model.parameters(), torch.tensor(1e-2), momentum=0.9),
}


def warm_up(optimizer: Any) -> Any:
    """Makes a schedule whose first rate is 0."""
    return LambdaLR(optimizer, lambda step: min(1.0, step / 10))


def one_cycle(optimizer: Any) -> Any:
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=NUM_STEPS + 1, cycle_momentum=False)


@pytest.mark.parametrize(("name", "schedule"), [("active", one_cycle), ("adamw", warm_up), ("sgd", warm_up)])
def test_rates_change_without_a_recompile(name: str, schedule: Any) -> None:
    step_run, loop_run = twice(sparse(), OPTIMIZERS[name])
    for run in (step_run, loop_run):
        run.scheduler = schedule(run.optimizer)
    counter = CompileCounterWithBackend("aot_eager")
    step = step_run.compiled(counter)
    step_run.in_step(step, map(batch_of, range(NUM_STEPS)))
    loop_run.in_loop(map(batch_of, range(NUM_STEPS)))
    assert_equal_runs(step_run, loop_run)
    assert counter.frame_count == 1 and step.fused


def cycle_momentum(optimizer: Any) -> Any:
    """Makes torch's own default, which changes betas or momentum in every step."""
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=NUM_STEPS + 1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_options_of_torch_change_in_every_step_without_a_recompile(name: str) -> None:
    step_run, loop_run = twice(sparse(), OPTIMIZERS[name])
    for run in (step_run, loop_run):
        run.scheduler = cycle_momentum(run.optimizer)
    counter = CompileCounterWithBackend("aot_eager")
    step = step_run.compiled(counter)
    for call in range(NUM_STEPS):
        for run in (step_run, loop_run):
            run.optimizer.param_groups[0]["weight_decay"] = 0.01 * call
        step_run.in_step(step, [batch_of(call)])
        loop_run.in_loop([batch_of(call)])
    assert_equal_runs(step_run, loop_run)
    assert counter.frame_count == 1 and step.fused


def test_options_that_change_in_every_step_end_the_fusion_with_their_names() -> None:
    step_run, loop_run = twice(sparse())
    for run in (step_run, loop_run):
        run.scheduler = cycle_momentum(run.optimizer)
    step = step_run.compiled()
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(
            UserWarning, match="compiled too often, since the optimizer's betas changed.*cycle_momentum=False"
        ),
    ):
        step_run.in_step(step, map(batch_of, range(5)), breaks=True)
    loop_run.in_loop(map(batch_of, range(5)))
    assert_equal_runs(step_run, loop_run)
    assert not step.fused


def test_other_options_change_too() -> None:
    step_run, loop_run = twice(sparse())
    step = step_run.compiled()
    changes: list[dict[str, Any]] = [
        {},
        {"betas": (0.8, 0.95)},
        {"betas": (0.7, 0.9), "weight_decay": 0.3, "eps": 1e-3, "lr": torch.tensor(3e-2)},
    ]
    for i, change in enumerate(changes):
        for run in (step_run, loop_run):
            for group in run.optimizer.param_groups:
                group.update(change)
        step_run.in_step(step, map(batch_of, range(5 * i, 5 * i + 5)))
        loop_run.in_loop(map(batch_of, range(5 * i, 5 * i + 5)))
    assert_equal_runs(step_run, loop_run)
    assert step.fused


def test_steps_in_one_process_do_not_know_of_each_other() -> None:
    """Dynamo gives up on a function after some recompiles, and makes symbols of sizes that were others before."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for density in (0.5, 0.25):
            model = sparse(density=density)
            counter = CompileCounterWithBackend("eager")
            step = smet.compile_train_step(model, active(model))
            step.compile(backend=counter)
            step(batch_of(0))
            assert step.fused
            (graph,) = counter.graphs
            inputs = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
            assert all(isinstance(size, int) for tensor in inputs for size in tensor.shape)


def test_too_many_recompiles_end_the_fusion_not_the_run() -> None:
    step_run, loop_run = twice(sparse())
    step = step_run.compiled()
    step_run.in_step(step, [batch_of(0)])
    batches = [{name: tensor[:rows] for name, tensor in batch_of(rows).items()} for rows in (3, 4)]
    with (
        torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False),
        pytest.warns(UserWarning, match="the step is not one graph"),
    ):
        step_run.in_step(step, batches, breaks=True)
    loop_run.in_loop([batch_of(0), *batches])
    assert_equal_runs(step_run, loop_run)
    assert not step.fused
