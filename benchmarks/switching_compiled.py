"""Measures what a compiled model costs after a switch: its first step there beside its first step of all.

``python -m benchmarks.switching_compiled`` starts two processes over gloo, each with a new compile cache. Blocks are
compiled one by one and sharded by ``fully_shard``, then moved to two replicas and back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from benchmarks.measuring import machine, spread
from smet_compile.distributed import Blueprint, switch

_WIDTH, _BLOCKS, _ROWS, _STEPS = 128, 4, 64, 5


class Block(nn.Module):
    """Has a norm, two linear layers and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, width)."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(mesh: DeviceMesh) -> nn.Module:
    """Makes the compiled model on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(_BLOCKS)))
    smet.sparsify(model, 0.25, block_shape=16)
    for block in model:
        block.compile()
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimize(model: nn.Module) -> tuple[torch.optim.Optimizer, smet.TopologyManager]:
    """Makes optimizer and manager."""
    optimizer = smet.ActiveAdamW(model, 1e-3)
    return optimizer, smet.TopologyManager(
        model, optimizer, total_steps=1000, every=100, schedule="cosine", auto_step=False
    )


def timed_step(run: Any) -> float:
    """Takes a step; returns its seconds."""
    began = time.perf_counter()
    run.forward(torch.ones(_ROWS, _WIDTH)).square().mean().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.manager.step()
    return time.perf_counter() - began


def measure(rank: int, folder: str, pipe: Any) -> None:
    """Measures on one rank; the first sends the seconds of steps in each layout."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache{rank}"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shards = DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp",))
    replicas = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("replicate", "dp"))
    blueprint = Blueprint(build, optimize)
    run = blueprint.begin(shards)
    found = [[timed_step(run) for _ in range(_STEPS)]]
    for mesh in (replicas, shards, replicas, shards):
        run = switch(run, blueprint.prepare(mesh)).run
        found.append([timed_step(run) for _ in range(_STEPS)])
    if rank == 0:
        pipe.send(found)
    distributed.barrier()
    os._exit(0)  # groups of meshes that are gone need no farewell


def run_all() -> list[str]:
    """Runs the benchmark; returns the lines that it prints."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=measure, args=(rank, folder, theirs)) for rank in range(2)]
        for each in ranks:
            each.start()
        cold, *warm = ours.recv()
        for each in ranks:
            each.join()
    return [
        f"{machine()}; 2 processes over gloo, {_BLOCKS} compiled blocks of width {_WIDTH}, tiles of 16",
        f"first step of all {cold[0]:.1f} s, later ones {spread([s for steps in (cold, *warm) for s in steps[1:]])} s",
        f"first step after a switch {spread([steps[0] for steps in warm])} s",
    ]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("\n".join(run_all()))
