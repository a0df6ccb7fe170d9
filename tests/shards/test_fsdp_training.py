"""A sharded model trains as one process would: losses, topologies, ages and history are equal."""

from typing import Any

import pytest
import torch

import smet_compile as smet
from tests.shards.setting import shard, sparse_net, train_steps, whole_state
from tests.support.pairs import pairwise
from tests.support.ranks import processes

STEPS, EVERY = 14, 4
_results: dict[Any, Any] = {}


def train(rank: int, world: int, dtype: torch.dtype, block_shape: Any, grow: str, options: dict[str, Any]) -> Any:
    model = sparse_net(dtype, block_shape)
    if world > 1:
        shard(model)
    optimizer = smet.ActiveAdamW(model, 3e-3, warmup_steps=5, weight_decay=0.1, **options)
    manager = smet.TopologyManager(model, optimizer, total_steps=20, every=EVERY, grow=grow, schedule="cosine")
    losses = train_steps((model, optimizer, manager), range(STEPS), rank, world)
    return losses, whole_state(model, optimizer), [event.to_dict() for event in manager.history]


def result(world: int, *case: Any) -> Any:
    key = (world, repr(case))
    if key not in _results:
        _results[key] = processes.run(world, train, *case)[0]
    return _results[key]


@pytest.mark.parametrize(
    ("world", "block_shape", "grow"), pairwise([2, 3, 4], [1, 4, (1, 5)], ["random", "gradient"]), ids=str
)
def test_a_sharded_run_in_fp64_is_that_of_one_process(world: int, block_shape: Any, grow: str) -> None:
    case = torch.float64, block_shape, grow, {}
    losses, state, history = result(1, *case)
    got_losses, got_state, got_history = result(world, *case)
    torch.testing.assert_close(got_losses, losses, rtol=0, atol=1e-12)
    assert got_history == history and len(history) == 3
    for name, tensor in state.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(got_state[name], tensor, rtol=0, atol=1e-10)
        else:
            assert torch.equal(got_state[name], tensor), name


def test_fp32() -> None:
    case = torch.float32, 1, "gradient", {}
    losses, got_losses = result(1, *case)[0], result(3, *case)[0]
    torch.testing.assert_close(got_losses, losses, rtol=0, atol=1e-6)
