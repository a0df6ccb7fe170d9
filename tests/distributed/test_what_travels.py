"""A switch brings all that decides how a run goes on, and refuses what it cannot bring before anything moves."""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from smet_compile.distributed import Blueprint, Run, switch
from tests.support.ranks import processes


def over(*ranks: int) -> DeviceMesh:
    return DeviceMesh("cpu", list(ranks), mesh_dim_names=("dp",))


def trained(run: Run, first: int, last: int) -> list[float]:
    """Makes steps; returns the losses of this rank."""
    losses = []
    for step in range(first, last):
        loss = loss_of(run, step)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_of(run: Run, step: int) -> Tensor:
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + distributed.get_rank()))
    return (run.forward(batch) - 1).square().mean()


def adamw(model: nn.Module) -> Any:
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    return optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=5)


class Tied(nn.Module):
    """Reads one weight in two layers, and has one buffer in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 32)
        self.last.weight = self.first.weight
        self.first.register_buffer("shift", torch.zeros(16))
        self.last.register_buffer("shift", self.first.shift)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.last.shift += x.mean(0).detach()
        return self.last(self.middle(self.first(x + self.first.shift).relu()))


def with_ties(mesh: Any) -> nn.Module:
    with torch.device("meta"):
        model = Tied()
    smet.sparsify(model, 0.3, include="middle")
    return fully_shard(model, mesh=mesh) if mesh.size() > 1 else model


def started(model: nn.Module) -> None:
    """Draws weights, and ties the buffers that ``materialize`` parts."""
    smet.materialize(model, seed=0, initialize=draw)
    model.last.shift = model.first.shift


def draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.reset_parameters()
        if "shift" in module._buffers:
            module.shift.zero_()


def stays_tied(rank: int, world: int) -> Any:
    found = []
    for moves in (False, True):
        plan = Blueprint(with_ties, adamw, initialize=started)
        run = plan.begin(over(*range(world)))
        assert run is not None
        losses = trained(run, 0, 7)
        if moves:
            run = switch(run, plan.prepare(over(*range(world)))).run
            assert run is not None and run.model.last.weight is run.model.first.weight
            assert run.model.last.shift is run.model.first.shift
        found.append(losses + trained(run, 7, 14))
    return found


def test_tied_weights_and_buffers_stay_tied() -> None:
    processes.stop()
    for world in (1, 2):
        for stayed, moved in processes.run(world, stays_tied):
            assert moved == stayed and len(set(stayed)) == 14
