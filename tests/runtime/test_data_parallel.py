"""Two data-parallel processes keep one topology, whatever each of them sees."""

import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import smet_compile as smet


def train(rank: int, port: int, grow: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = smet.sparsify(nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 5)), 0.3)
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=3, grow=grow)
    parallel = DistributedDataParallel(model)
    for step in range(10):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(100 * step + rank))
        parallel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert len(manager.history) == 3
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_ranks_agree(grow: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(train, args=(port, grow, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
