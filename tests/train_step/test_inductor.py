"""Tests the step as users run it, with generated code and changes of topology."""

from typing import Any

import pytest
from torch import Tensor
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from tests.train_step.setting import Net, active, assert_equal_runs, batch_of, sparse, twice

NUM_STEPS = 20


class Region(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return checkpoint(super().hidden, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("make_optimizer", "grow", "block_shape"),
    [(active, "gradient", 4), (lambda model: SGD(model.parameters(), 0.1, momentum=0.9), "random", 1)],
    ids=["active_gradient_tiles", "sgd_random"],
)
def test_equals_the_loop(make_optimizer: Any, grow: str, block_shape: int) -> None:
    step_run, loop_run = twice(sparse(Region, block_shape), make_optimizer, grow=grow)
    step_run.in_step(smet.compile_train_step(step_run.model, step_run.optimizer), map(batch_of, range(NUM_STEPS)))
    loop_run.in_loop(map(batch_of, range(NUM_STEPS)))
    assert_equal_runs(step_run, loop_run)
    assert len(loop_run.history()) == 5
