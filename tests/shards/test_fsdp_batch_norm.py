"""Corrected gradients of sharded models are those of one process, through topology updates by gradient."""

import copy

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from tests.correction.networks import images, loss_of, sparse_net
from tests.support.ranks import processes

CORRECTED = ("conv.weight", "point.weight", "linear.weight")


def losses_of(rank: int, world: int) -> tuple[list[float], list[float], int]:
    """Returns the losses of a sharded run and of a plain one; every rank has the same batch."""
    torch.manual_seed(0)
    plain = sparse_net()
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    losses = []
    for model in (sharded, plain):
        optimizer = smet.ActiveSGD(model, lr=0.05, warmup_steps=0)
        assert smet.correct_gradients(model, optimizer, images()).corrected == CORRECTED
        manager = smet.TopologyManager(model, optimizer, total_steps=20, every=2, grow="gradient", min_age=0)
        found = []
        for step in range(5):
            loss = loss_of(model, images(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.step()
            found.append(loss.item())
        losses.append(found)
    return losses[0], losses[1], len(manager.history)


def test_sharded_is_plain() -> None:
    for sharded, plain, num_updates in processes.run(2, losses_of):
        torch.testing.assert_close(torch.tensor(sharded), torch.tensor(plain), rtol=1e-12, atol=1e-12)
        assert num_updates == 2
