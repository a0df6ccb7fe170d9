"""An optimizer step and a topology update of shards are those of whole parameters, bit for bit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from tests.shards.setting import put_gradients, whole_state
from tests.support.ranks import processes


class Kind(NamedTuple):
    """Describes the weights and their optimizer.

    ``atol`` is 0 for equality bit for bit. Without ``plain`` every parameter is compact.
    """

    dtype: torch.dtype
    block_shape: Any = 1
    moment_dtype: Any = None
    make: Callable[..., torch.optim.Optimizer] = smet.ActiveAdamW
    plain: bool = True
    atol: float = 0.0


BF16 = torch.bfloat16
KINDS = {  # on 3 ranks and 4 in turn: every dtype, and every shape of blocks, meets both
    "fp32": Kind(torch.float32),
    "fp32 tiles": Kind(torch.float32, 4),
    "fp32 runs": Kind(torch.float32, (1, 5)),
    "bf16": Kind(BF16, 1, BF16),
    "bf16 tiles": Kind(BF16, 4, BF16),
    "bf16 runs": Kind(BF16, (1, 5), BF16),
    "8-bit tiles": Kind(BF16, 4, "int8", plain=False),
    "Lion": Kind(BF16, 1, BF16, smet.ActiveLion),
    "SGD": Kind(torch.float32, 4, None, smet.ActiveSGD),
    "SCALE": Kind(torch.float64, 1, None, smet.ActiveScale, atol=1e-12),
    "SCALE of tiles": Kind(torch.float64, 4, None, smet.ActiveScale, atol=1e-12),
}


def net(kind: Kind) -> nn.Module:
    """Has a weight with fewer blocks than there are ranks, and an embedding, a norm and a head where they may be."""
    torch.manual_seed(0)
    layers = [nn.Linear(33, 50, bias=False), nn.Linear(50, 31, bias=False), nn.Linear(12, 8, bias=False)]
    more = [nn.Linear(7, 11), nn.LayerNorm(11), nn.Embedding(13, 6)] if kind.plain else []
    model = smet.sparsify(
        nn.Sequential(*layers, *more).to(kind.dtype), 0.3, block_shape=kind.block_shape, include=["0", "1"]
    )
    return smet.sparsify(model, 2.4 / 6 if kind.block_shape == 4 else 0.03, block_shape=kind.block_shape, include="2")


def train(rank: int, world: int, name: str, goes_back: bool = False) -> list[str]:
    """Returns the names of what differs between the sharded model and the whole one."""
    kind = KINDS[name]
    runs = []
    for sharded in (False, True):
        model = net(kind)
        if sharded:
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
        optimizer = kind.make(model, 1e-2, moment_dtype=kind.moment_dtype, warmup_steps=3)
        manager = smet.TopologyManager(model, optimizer, total_steps=100, every=3, schedule="cosine")
        runs.append((model, optimizer, manager))
    best: dict[int, dict[str, torch.Tensor]] = {}
    for step in range(10):
        for model, optimizer, manager in runs:
            if goes_back and step == 2:
                best[id(model)] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            if goes_back and step == 8:  # the state moves back with the weights
                model.load_state_dict(best[id(model)])
            put_gradients(model, step)
            optimizer.step()
            manager.step()
    (whole, optimizer, manager), (sharded_model, its_optimizer, its_manager) = runs
    expected, got = whole_state(whole, optimizer), whole_state(sharded_model, its_optimizer)
    assert len(manager.history) == 3 and manager.history == its_manager.history
    return [
        key for key, tensor in expected.items() if not key.endswith("scales") and not is_same(tensor, got[key], kind)
    ]


def is_same(expected: torch.Tensor, got: torch.Tensor, kind: Kind) -> bool:
    if kind.atol and expected.is_floating_point():
        return torch.allclose(got, expected, rtol=0, atol=kind.atol)
    return torch.equal(got, expected)


@pytest.mark.parametrize(("world", "name"), [(3 + number % 2, name) for number, name in enumerate(KINDS)])
def test_shards_are_updated_as_whole_parameters(world: int, name: str) -> None:
    assert processes.run(world, train, name) == [[]] * world


@pytest.mark.parametrize(("world", "name"), [(3, "fp32 runs"), (2, "bf16"), (2, "8-bit tiles")])
def test_state_follows_weights_that_are_loaded_alone(world: int, name: str) -> None:
    assert processes.run(world, train, name, True) == [[]] * world


def refused(rank: int, world: int) -> str:
    model = smet.sparsify(nn.Linear(64, 64, bias=False), 0.5)
    fully_shard(model)
    try:
        smet.ActiveAdamW(model, moment_dtype="int8")
    except ValueError as error:
        return str(error)
    return ""


def test_groups_of_codes_that_are_cut_are_refused() -> None:
    (message, _) = processes.run(2, refused)
    assert message.startswith("weight: expected a weight of tiles for 8-bit state on several ranks")


def staged(rank: int, world: int) -> str:
    model = smet.sparsify(nn.Linear(64, 64, bias=False), 0.5)
    fully_shard(model)
    optimizer = smet.ActiveAdamW(model)
    try:
        smet.TopologyManager(model, optimizer, total_steps=10, density_schedule=[(2, 0.25)])
    except ValueError as error:
        return str(error)
    return ""


def test_density_stages_are_refused() -> None:
    (message,) = processes.run(1, staged)
    assert message.startswith("density_schedule: expected one process without data parallelism, got a sharded model")
