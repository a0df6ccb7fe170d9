"""An optimizer step and a topology update of shards are those of whole parameters, bit for bit."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from tests.shards.setting import put_gradients, whole_state
from tests.support.ranks import processes

KINDS = {
    "fp32": (torch.float32, None, 1),
    "fp32 tiles": (torch.float32, None, 4),
    "fp32 runs": (torch.float32, None, (1, 5)),
    "bf16": (torch.bfloat16, torch.bfloat16, 1),
    "bf16 tiles": (torch.bfloat16, torch.bfloat16, 4),
    "bf16 runs": (torch.bfloat16, torch.bfloat16, (1, 5)),
    "8-bit tiles": (torch.bfloat16, "int8", 4),
}


def net(dtype: torch.dtype, block_shape: Any) -> nn.Module:
    """Has no plain parameter; one weight has fewer blocks than there are ranks."""
    torch.manual_seed(0)
    layers = (nn.Linear(33, 50, bias=False), nn.Linear(50, 31, bias=False), nn.Linear(12, 8, bias=False))
    model = smet.sparsify(nn.Sequential(*layers).to(dtype), 0.3, block_shape=block_shape, exclude="2")
    return smet.sparsify(model, 2.4 / 6 if block_shape == 4 else 0.03, block_shape=block_shape, include="2")


def train(rank: int, world: int, kind: str) -> list[str]:
    """Returns the names of what differs between the sharded model and the whole one."""
    dtype, moment_dtype, block_shape = KINDS[kind]
    runs = []
    for sharded in (False, True):
        model = net(dtype, block_shape)
        if sharded:
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
        optimizer = smet.ActiveAdamW(model, 1e-2, moment_dtype=moment_dtype, warmup_steps=3, weight_decay=0.1)
        manager = smet.TopologyManager(model, optimizer, total_steps=100, every=3, schedule="cosine")
        runs.append((model, optimizer, manager))
    for step in range(10):
        for model, optimizer, manager in runs:
            put_gradients(model, step)
            optimizer.step()
            manager.step()
    (whole, optimizer, manager), (sharded_model, its_optimizer, its_manager) = runs
    expected, got = whole_state(whole, optimizer), whole_state(sharded_model, its_optimizer)
    assert len(manager.history) == 3 and manager.history == its_manager.history
    return [name for name in expected if not torch.equal(expected[name], got[name]) and not name.endswith("scales")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_shards_are_updated_as_whole_parameters(world: int, kind: str) -> None:
    assert processes.run(world, train, kind) == [[]] * world
