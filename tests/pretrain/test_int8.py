"""8-bit moments train as fp32 ones do: a small transformer on source code ends at the same loss."""

import statistics

import pytest

from smet_compile.pretrain.config import resolve
from smet_compile.pretrain.data import open_data
from smet_compile.pretrain.tokenizer import ByteTokenizer
from smet_compile.pretrain.training import build_training, rate_schedule, train_step, validation_loss
from tests.pretrain.runs import SMALL_MODEL

pytestmark = SMALL_MODEL


def loss_after_training(moments: str, block: str, seed: int, num_steps: int) -> tuple[float, float]:
    """Returns the held-out loss before and after."""
    config = resolve(
        preset="nano", moment_dtype=moments, block=block, steps=num_steps, sequence=64, eval_windows=64, eager=True,
        device="cpu", seed=seed, schedule="cosine",
    )  # fmt: skip
    training, data = build_training(config, 256), open_data(config, ByteTokenizer())
    before = validation_loss(training, data.validation, config)
    schedule = rate_schedule(training, config)
    for step in range(num_steps):
        train_step(training, data.train.batch(step))
        schedule.step()
    assert training.manager is not None and len(training.manager.history) > 5
    return before, validation_loss(training, data.validation, config)


@pytest.mark.parametrize("block", ["1", "16"])
@pytest.mark.parametrize(
    ("num_steps", "num_seeds"),
    [(120, 1), pytest.param(300, 3, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_within_a_hundredth_of_the_loss_with_fp32_moments(num_steps: int, num_seeds: int, block: str) -> None:
    """Late in training a pair differs by a hundredth of the loss as seeds do, so a long run is that of several."""
    pairs = [
        [loss_after_training(moments, block, seed, num_steps) for moments in ("float32", "int8")]
        for seed in range(num_seeds)
    ]
    before, expected, actual = (
        statistics.mean(losses)
        for losses in zip(*((exact[0], exact[1], coded[1]) for exact, coded in pairs), strict=True)
    )
    assert expected < 0.55 * before
    assert abs(actual - expected) < 0.01 * expected
