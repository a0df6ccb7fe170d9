"""ZeroRedundancyOptimizer: each process keeps the state of its part of the parameters; all keep one topology."""

import functools
import socket
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on


def sparse_layers() -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(two_layers(), density=0.4)


def active(params: Any, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return smet.ActiveAdamW(params, model=model, warmup_steps=3, **options)


def adamw(params: Any, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **options)


def train(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for kind in (active, adamw):
        model, twin = sparse_layers(), sparse_layers()
        optimizer = ZeroRedundancyOptimizer(model.parameters(), functools.partial(kind, model=model), lr=1e-2)
        manager = smet.TopologyManager(model, optimizer, total_steps=1000, every=3)
        one = kind(twin.parameters(), twin, lr=1e-2)
        twin_manager = smet.TopologyManager(twin, one, total_steps=1000, every=3)
        parallel = DistributedDataParallel(model)
        for step in range(7):
            loss_on(parallel, 2 * step + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.step()
            for each in (0, 1):  # what both processes do together
                (loss_on(twin, 2 * step + each) / 2).backward()
            one.step()
            one.zero_grad()
            twin_manager.step()
        assert manager.num_steps == 7 and [event.step for event in manager.history] == [3, 6]
        assert_same(snapshot(model), snapshot(twin))
        other = dict(zip(model.parameters(), twin.parameters(), strict=True))
        own = {p: state for p, state in optimizer.optim.state.items() if state}
        assert 0 < len(own) < len(other)
        for parameter, state in own.items():
            assert_same(dict(state), dict(one.state[other[parameter]]))
        known = {event.sites[name].mean_age is not None for event in manager.history for name in event.sites}
        holds = {site.values in own for site in find_sites(model).values()}
        assert known == (holds if kind is active else {False})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_process_moves_the_state_it_keeps() -> None:
    """Bit for bit the run of one process: the mean of two gradients is exact."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(train, args=(port,), nprocs=2)
