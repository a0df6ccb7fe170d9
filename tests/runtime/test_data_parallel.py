"""Data-parallel processes keep one topology, whatever each of them sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import smet_compile as smet
from smet_compile.runtime import update
from tests.support.ranks import processes
from tests.support.snapshots import assert_same

Loss = Callable[[nn.Module, int, int], Tensor]


def plain_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 5))


class Branches(nn.Module):
    """The layer between may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor, short: bool) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x if short else torch.tanh(self.between(x)))


def inputs(step: int, rank: int) -> Tensor:
    return torch.randn(8, 24, generator=torch.Generator().manual_seed(100 * step + rank))


def one_forward(parallel: nn.Module, step: int, rank: int) -> Tensor:
    return parallel(inputs(step, rank)).square().mean()


def two_forwards(parallel: nn.Module, step: int, rank: int) -> Tensor:
    return one_forward(parallel, step, rank) + one_forward(parallel, step + 50, rank)


def mean_of_ranks(parallel: nn.Module, step: int, rank: int) -> Tensor:
    return one_forward(parallel, step, rank)


def short_on_one_rank(parallel: nn.Module, step: int, rank: int) -> Tensor:
    """In the first step that an update is due after, rank 1 leaves a layer out."""
    return parallel(inputs(step, rank), short=step == 2 and rank == 1).square().mean()


def train(rank: int, world: int, make: Callable[[], nn.Module], loss: Loss, grow: str, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if loss is mean_of_ranks:
            patch.setattr(update, "_KEPT_PER_GROWN", 1000)
        train_and_save(rank, make, loss, grow, folder)


def train_and_save(rank: int, make: Callable[[], nn.Module], loss: Loss, grow: str, folder: Path) -> None:
    model = smet.sparsify(make(), 0.3)
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=3, grow=grow)
    parallel = DistributedDataParallel(model, find_unused_parameters=isinstance(model, Branches))
    for step in range(10):
        loss(parallel, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        if step == 2 and rank == 0:
            bits = {name: bits for name, bits in model.state_dict().items() if name.endswith("topology")}
            torch.save(bits, folder / "first.pt")
    history = [event.to_dict() for event in manager.history]
    torch.save({"model": model.state_dict(), "history": history}, folder / f"{rank}.pt")


def train_together(make: Callable[[], nn.Module], loss: Loss, grow: str, folder: Path) -> dict[str, Any]:
    """Trains in two processes, which end alike; returns what both saved."""
    processes.run(2, train, make, loss, grow, folder)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first, second)
    return first


@pytest.mark.parametrize(
    ("loss", "grow"), [(one_forward, "random"), (one_forward, "gradient"), (two_forwards, "gradient")]
)
def test_ranks_agree(loss: Loss, grow: str, tmp_path: Path) -> None:
    history = train_together(plain_layers, loss, grow, tmp_path)["history"]
    assert [set(event["sites"]) for event in history] == [{"0.weight", "2.weight"}] * 3


def test_a_layer_that_one_rank_did_not_use_is_left_as_it_is(tmp_path: Path) -> None:
    """The other rank knows where it would grow, this one does not; neither waits for the other."""
    history = train_together(Branches, short_on_one_rank, "gradient", tmp_path)["history"]
    every = {"first.weight", "between.weight", "last.weight"}
    assert [set(event["sites"]) for event in history] == [every - {"between.weight"}, every, every]


def test_blocks_grow_by_the_mean_gradient_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks grow what one process grows that sees the batches of both."""
    together = train_together(plain_layers, mean_of_ranks, "gradient", tmp_path)["model"]
    monkeypatch.setattr(update, "_KEPT_PER_GROWN", 1000)
    torch.manual_seed(0)
    model = smet.sparsify(plain_layers(), 0.3)
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=3, grow="gradient")
    for step in range(3):
        (sum(one_forward(model, step, rank) for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    alone = {name: bits for name, bits in model.state_dict().items() if name.endswith("topology")}
    assert len(manager.history) == 1 and len(alone) == 2
    first = torch.load(tmp_path / "first.pt", weights_only=True)
    assert_same(first, alone)
    assert together.keys() == model.state_dict().keys()
