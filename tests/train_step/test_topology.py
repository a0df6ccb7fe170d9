"""The topology changes between steps as it does between eager ones: same history, same masks, same losses."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.ops.sinks import counts_of
from smet_compile.runtime import optimizer_steps
from tests.ops.call_forms import ReadTwice
from tests.train_step.setting import Fault, Net, active, assert_equal_runs, batch_of, faulty, sparse, twice

NUM_STEPS = 22
OPTIMIZERS: dict[str, Any] = {
    "active": active,
    "adamw": lambda model: AdamW(model.parameters(), 1e-2),
    "plain_sgd": lambda model: SGD(model.parameters(), lr=0.1),
}


class Wide(Net):
    """Has a layer that reads its weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.between = ReadTwice(20, 20)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.between(super().hidden(x)))


@pytest.mark.parametrize(
    ("name", "grow", "block_shape"),
    [
        ("active", "random", 1),
        ("active", "gradient", 4),
        ("adamw", "gradient", 1),
        ("plain_sgd", "random", (1, 4)),
    ],
)
def test_equals_the_loop(name: str, grow: str, block_shape: Any) -> None:
    step_run, loop_run = twice(sparse(Wide, block_shape), OPTIMIZERS[name], grow=grow)
    step = step_run.compiled()
    step_run.in_step(step, map(batch_of, range(NUM_STEPS)))
    loop_run.in_loop(map(batch_of, range(NUM_STEPS)))
    assert_equal_runs(step_run, loop_run)
    assert len(loop_run.history()) == 5 and step.fused


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_in_every_step_from_the_first(grow: str) -> None:
    """There is no earlier step in which counts could be read."""
    step_run, loop_run = twice(sparse(), every=1, grow=grow)
    step_run.in_step(step_run.compiled(), map(batch_of, range(4)))
    loop_run.in_loop(map(batch_of, range(4)))
    assert_equal_runs(step_run, loop_run)
    assert len(loop_run.history()) == 4


def test_a_gradient_that_is_not_finite_postpones_the_update() -> None:
    """It may be that of the fused weight or of a bias; faults in other steps do not matter."""
    step_run, loop_run = twice(sparse(Fault), grow="gradient")
    batches = [faulty(i, i in (1, 3, 4, 9, 11), i == 5) for i in range(NUM_STEPS)]
    step_run.in_step(step_run.compiled(), batches)
    loop_run.in_loop(batches)
    assert_equal_runs(step_run, loop_run)
    assert [event["step"] for event in loop_run.history()] == [7, 8, 13, 16, 20]
    assert step_run.optimizer.state[find_sites(step_run.model)["first.weight"].values]["num_skipped"] > 0


@pytest.mark.usefixtures("uncompiled")
def test_an_optimizer_that_skips_nothing_postpones_too() -> None:
    """The weight is NaN from the fault on, and the topology stays."""
    step_run, loop_run = twice(sparse(Fault), OPTIMIZERS["plain_sgd"], every=4)
    batches = [faulty(i, bad_weight=i == 7) for i in range(10)]
    step_run.in_step(step_run.compiled(), batches)
    loop_run.in_loop(batches)
    assert step_run.history() == loop_run.history()
    assert [event["step"] for event in loop_run.history()] == [4]


@pytest.mark.usefixtures("uncompiled")
def test_an_update_postponed_ten_times_is_left_out() -> None:
    runs = twice(sparse(Fault), every=4)
    messages = []
    for go in (lambda batches: runs[0].in_step(runs[0].compiled(), batches), runs[1].in_loop):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            go([faulty(i, bad_weight=2 < i < 13) for i in range(18)])
        messages.append([str(w.message) for w in caught if "TopologyManager" in str(w.message)])
    assert_equal_runs(*runs)
    assert messages[0] == messages[1] and "first.parametrizations.weight.original is not finite" in messages[0][0]


def test_a_weight_that_no_step_reaches_keeps_its_topology() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.between = nn.Linear(20, 20)

    step_run, loop_run = twice(sparse(Unused), every=4)
    find_sites(step_run.model)["last.weight"].values.requires_grad_(False)
    find_sites(loop_run.model)["last.weight"].values.requires_grad_(False)
    step_run.in_step(step_run.compiled(), map(batch_of, range(10)))
    loop_run.in_loop(map(batch_of, range(10)))
    assert_equal_runs(step_run, loop_run)
    assert [set(event["sites"]) for event in loop_run.history()] == [{"first.weight"}] * 2


@pytest.mark.usefixtures("uncompiled")
def test_a_manager_of_a_part_of_the_model_waits_for_all_of_it() -> None:
    """In eager mode it looks at every gradient that the optimizer uses, so here too."""
    step_run, loop_run = twice(sparse(Fault))
    for run in (step_run, loop_run):
        part = nn.ModuleDict({"last": run.model.last})
        run.manager = smet.TopologyManager(part, run.optimizer, total_steps=100, every=4)
    batches = [faulty(i, bad_weight=i == 3) for i in range(6)]
    step_run.in_step(step_run.compiled(), batches)
    loop_run.in_loop(batches)
    assert_equal_runs(step_run, loop_run)
    assert [event["step"] for event in loop_run.history()] == [5]


@pytest.mark.usefixtures("uncompiled")
def test_a_manager_made_later_counts_from_there() -> None:
    """Blocks skipped before are no reason to wait, and weights trained before do not count as trained now."""
    step_run, loop_run = twice(sparse(Fault))
    step = step_run.compiled()
    for first, every in ((0, 100), (3, 1)):
        for run in (step_run, loop_run):
            run.manager = smet.TopologyManager(run.model, run.optimizer, total_steps=300, every=every)
        batches = [faulty(first + i, bad_weight=first == 0) for i in range(3)]
        step_run.in_step(step, batches)
        loop_run.in_loop(batches)
    assert_equal_runs(step_run, loop_run)
    assert len(loop_run.history()) == 3


@pytest.mark.usefixtures("uncompiled")
def test_counts_are_read_in_steps_that_matter_and_in_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading waits for the device."""
    step_run, _ = twice(sparse(), every=10)
    reads = []
    read = optimizer_steps._read_counts
    monkeypatch.setattr(
        optimizer_steps, "_read_counts", lambda counts: reads.append(len(step_run.losses)) or read(counts)
    )
    step_run.in_step(step_run.compiled(), map(batch_of, range(NUM_STEPS)))
    assert set(reads) == {8, 9, 18, 19} and len(step_run.history()) == 2


@pytest.mark.usefixtures("uncompiled")
def test_a_copy_counts_for_itself() -> None:
    step_run, _ = twice(sparse())
    step_run.in_step(step_run.compiled(), map(batch_of, range(3)))
    copied = copy.deepcopy(step_run)
    assert counts_of(step_run.optimizer) and not counts_of(copied.optimizer)
    for run in (step_run, copied):
        run.in_step(run.compiled(), map(batch_of, range(3, 9)))
    assert_equal_runs(copied, step_run)
