"""8-bit moments train as fp32 ones do: 300 steps of a small transformer on source code end at the same loss."""

import statistics

import pytest

from smet_compile.pretrain.config import resolve
from smet_compile.pretrain.data import ByteTokenizer, open_data
from smet_compile.pretrain.training import build_training, learning_rate, train_step, validation_loss
from tests.pretrain.runs import SMALL_MODEL

pytestmark = SMALL_MODEL
NUM_STEPS = 300
SEEDS = range(3)
"""One seed says little: the difference of a pair has a standard deviation of a hundredth of the loss."""


def loss_after_training(moments: str, block: str, seed: int) -> tuple[float, float]:
    """Returns the held-out loss before and after."""
    config = resolve(
        preset="nano", moment_dtype=moments, block=block, steps=NUM_STEPS, sequence=64, eval_windows=64, eager=True,
        device="cpu", seed=seed, schedule="cosine",
    )  # fmt: skip
    training, data = build_training(config, 256), open_data(config, ByteTokenizer())
    before = validation_loss(training, data.validation, config)
    for step in range(NUM_STEPS):
        train_step(training, data.train.batch(step), learning_rate(config, step))
    assert training.manager is not None and len(training.manager.history) > 5
    return before, validation_loss(training, data.validation, config)


@pytest.mark.parametrize("block", ["1", "16"])
def test_within_a_hundredth_of_the_loss_with_fp32_moments(block: str) -> None:
    pairs = [[loss_after_training(moments, block, seed) for moments in ("float32", "int8")] for seed in SEEDS]
    before, expected, actual = (
        statistics.mean(losses)
        for losses in zip(*((exact[0], exact[1], coded[1]) for exact, coded in pairs), strict=True)
    )
    assert expected < 0.55 * before
    assert abs(actual - expected) < 0.01 * expected
