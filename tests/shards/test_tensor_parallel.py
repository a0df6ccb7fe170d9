"""A model that tensor parallelism cuts trains as one process trains it with the same slabs."""

from typing import Any

import pytest
import torch

import smet_compile as smet
from tests.shards.parallel import dense_weights, parallel_net, train, whole_net
from tests.support.ranks import processes

UPDATES = {"total_steps": 60, "every": 8, "schedule": "cosine"}


def run(rank: int, world: int, tp: int, block_shape: Any, dtype: torch.dtype, grow: str) -> list[str]:
    """Returns what differs between the model that the ranks hold together and that of one process."""
    dp = world // tp
    model, _ = parallel_net(dtype, tp, dp, block_shape, fully=dp > 1)
    whole = whole_net(dtype, block_shape)
    runs = []
    for each in (model, whole):
        optimizer = smet.ActiveAdamW(each, 1e-2, warmup_steps=3)
        runs.append((each, optimizer, smet.TopologyManager(each, optimizer, grow=grow, **UPDATES)))
    start, expected_start = dense_weights(model), dense_weights(whole)
    losses = train(runs[0], range(30), rank // tp, dp)
    expected = train(runs[1], range(30), 0, 1)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    found = [f"start of {name}" for name in start if not torch.equal(start[name], expected_start[name])]
    found += [f"loss {step}" for step in range(30) if abs(losses[step] - expected[step]) > tolerance]
    end, expected_end = dense_weights(model), dense_weights(whole)
    found += [
        f"topology of {name}"
        for name in end
        if name.endswith("weight") and not torch.equal(end[name] != 0, expected_end[name] != 0)
    ]
    assert len(runs[1][2].history) == 3
    if runs[0][2].history != runs[1][2].history:
        found.append("history")
    return found


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("block_shape", [1, 4, (1, 4)])
@pytest.mark.parametrize("world,tp", [(2, 2), (4, 4), (4, 2)])
def test_training_is_that_of_one_process(world: int, tp: int, block_shape: Any, grow: str) -> None:
    assert processes.run(world, run, tp, block_shape, torch.float64, grow) == [[]] * world
