"""Makes models whose parameters are sharded over ranks, and cuts batches and gradients for them."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.ops.law import compute_dtype
from smet_compile.shards import Rows, make_whole

ROWS = 12
"""Rows of a batch of all ranks together: 1, 2, 3 and 4 ranks get equally many."""


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 2 * width + 1
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Has two residual layers between an embedding and a head."""

    def __init__(self, width: int = 20, vocabulary: int = 17, hidden: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sparse_net(
    dtype: torch.dtype = torch.float64, block_shape: Any = 1, density: float = 0.3, seed: int = 0
) -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(Net().to(dtype), density, block_shape=block_shape, exclude="head", seed=seed)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shards each layer, then the rest, as FSDP2's users do."""
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def loss_of(model: nn.Module, step: int, rank: int, world: int) -> Tensor:
    """Returns the loss of this rank's rows of the batch of a step; the batch does not depend on the ranks."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(17, (ROWS, 6), generator=generator)
    mine = tokens[ROWS // world * rank : ROWS // world * (rank + 1)]
    logits = model(mine[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits.to(compute_dtype(logits.dtype)), mine[:, 1:].flatten())


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach().double().clone()
    distributed.all_reduce(total)
    return float(total / distributed.get_world_size())


def train_steps(parts: Any, steps: range, rank: int, world: int, looks: bool = False) -> list[float]:
    """Trains model, optimizer and manager in these steps; returns the mean losses of all ranks.

    ``looks``: whether the loss of another batch is computed first, and its graph kept through the step.
    """
    model, optimizer, manager = parts
    losses = []
    for step in steps:
        kept = loss_of(model, -1 - step, rank, world) if looks else None
        loss = loss_of(model, step, rank, world)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        losses.append(mean_over_ranks(loss))
        del kept
    return losses


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns values, topologies and optimizer state whole, by name; every rank has to ask."""
    state = {name: make_whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state[parameter].items():
            state[f"{name}/{key}"] = make_whole(tensor).clone()
    return state


def put_gradients(model: nn.Module, step: int) -> None:
    """Gives every parameter a random gradient; a rank gets its rows of it."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        rows = Rows.of(parameter)
        whole = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = rows.wrap(parameter, whole[rows.here].clone())


def topologies(model: nn.Module) -> dict[str, Tensor]:
    return {name: site.compact.topology.clone() for name, site in find_sites(model).items()}


def as_bytes(tree: Any) -> bytes:
    """Returns a tree as one value: DCP takes trees apart, and misses lists that have grown."""
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()
