"""Measures a live switch of layout beside a checkpoint of torch.distributed.checkpoint on a memory disk, in one run.

``python -m benchmarks.switching --megabytes 200 --turns 3`` starts four processes over gloo. Each turn goes from four
ranks by ``fully_shard`` to two and back: once by saving model, optimizer and manager with DCP, making a new run and
loading into it, once by ``smet_compile.distributed.switch``, in each of the ways in which it sends. ``--paper``
computes switches of 7B and 70B instead, from sizes alone.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from benchmarks import switching_on_paper
from benchmarks.measuring import machine, spread
from smet_compile.distributed import Blueprint, Run, SwitchOptions, switch
from smet_compile.distributed.transfer import WAYS, Way

_DENSITY, _LAYERS, _BYTES_OF_A_WEIGHT = 0.25, 8, 12 + 1 / 4
_MEMORY_DISK = Path("/dev/shm")
_RANKS, _FEWER = [0, 1, 2, 3], [0, 1]


def width_for(megabytes: int) -> int:
    """Returns the width of layers whose values, moments and ages take about so many megabytes together."""
    weights = megabytes * 1e6 / _BYTES_OF_A_WEIGHT / _DENSITY / _LAYERS
    return max(64, round(weights**0.5 / 64) * 64)


def build(mesh: DeviceMesh, width: int) -> nn.Module:
    """Makes the model on the meta device: linear layers of tiles of 32, each a group of its own."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(_LAYERS)))
    smet.sparsify(model, _DENSITY, block_shape=32)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimize(model: nn.Module) -> tuple[torch.optim.Optimizer, smet.TopologyManager]:
    """Makes optimizer and manager."""
    optimizer = smet.ActiveAdamW(model, 1e-3, warmup_steps=5)
    return optimizer, smet.TopologyManager(
        model, optimizer, total_steps=1000, every=100, schedule="cosine", auto_step=False
    )


def blueprint(width: int) -> Blueprint:
    """Says how the run is made."""
    return Blueprint(lambda mesh: build(mesh, width), optimize)


def begin(mesh: DeviceMesh, width: int) -> Run | None:
    """Makes a run that has trained for a step; None on a rank that has no part in it."""
    run = blueprint(width).begin(mesh)
    if run is None:
        return None
    run.model(torch.randn(4, width)).square().mean().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    assert run.manager is not None
    run.manager.step()
    return run


def save(run: Run | None, folder: Path) -> None:
    """Saves the run by DCP; the ranks that hold it do so together."""
    if run is not None:
        dcp.save(_tree(run), checkpoint_id=folder, process_group=run.mesh.get_group())


def load(run: Run | None, folder: Path) -> None:
    """Loads into a run that was just made."""
    if run is None:
        return
    tree = _tree(run)
    dcp.load(tree, checkpoint_id=folder, process_group=run.mesh.get_group())
    set_state_dict(run.model, run.optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optimizer"])
    assert run.manager is not None
    run.manager.load_state_dict(torch.load(io.BytesIO(tree["manager"])))


def _tree(run: Run) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(run.model, run.optimizer)
    file = io.BytesIO()
    assert run.manager is not None
    torch.save(run.manager.state_dict(), file)
    return {"model": of_model, "optimizer": of_optimizer, "manager": file.getvalue()}


def make_new(mesh: DeviceMesh, width: int) -> Run | None:
    """Makes the run that a checkpoint is loaded into."""
    return blueprint(width).begin(mesh)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what a call returns, and the seconds until all ranks have made it."""
    distributed.barrier()
    start = time.perf_counter()
    found = work()
    distributed.barrier()
    return found, time.perf_counter() - start


@dataclass(frozen=True)
class Turn:
    """Holds what one change from a layout to the other took, in seconds, and what it sent and stored.

    Args:
        preparing: groups, model on the meta device and its description, which a run need not wait for. pause: the rest.
        phases: of the pause, on the first rank. save, making, load: by DCP, with the run that it loads into.
        sent, over: bytes, and over the fewest. peak: the most that the first rank stored over what it stores before
            or after, whichever is more.
    """

    way: Way
    preparing: float
    pause: float
    phases: dict[str, float]
    save: float
    making: float
    load: float
    sent: int
    over: float
    peak: float


def measure(rank: int, store: str, width: int, turns: int, pipe: Any) -> None:
    """Measures on one rank; the first sends the turns."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(_RANKS))
    meshes = [DeviceMesh("cpu", ranks, mesh_dim_names=("dp",)) for ranks in (_RANKS, _FEWER)]
    run, found = begin(meshes[0], width), []
    for number in range(2 * turns * len(WAYS)):
        mesh, way = meshes[(number + 1) % 2], WAYS[number // 2 % len(WAYS)]
        folder = (_MEMORY_DISK if _MEMORY_DISK.exists() else Path(store).parent) / f"{Path(store).parent.name}-{number}"
        _, of_save = timed(lambda run=run, folder=folder: save(run, folder))
        new, of_making = timed(lambda mesh=mesh: make_new(mesh, width))
        _, of_load = timed(lambda new=new, folder=folder: load(new, folder))
        del new
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        prepared, of_preparing = timed(lambda mesh=mesh: blueprint(width).prepare(mesh))
        switched, pause = timed(
            lambda run=run, prepared=prepared, way=way: switch(run, prepared, SwitchOptions(way=way))
        )
        run, plan = switched.run, switched.plan
        stored = max(plan.stored_before[0], plan.stored_after[0])
        over, peak = plan.total_sent / plan.lower_bound, switched.meter.peak / stored
        phases, sent = switched.seconds, plan.total_sent
        found.append(Turn(way, of_preparing, pause, phases, of_save, of_making, of_load, sent, over, peak))
    if rank == 0:
        pipe.send(found)
    distributed.barrier()
    os._exit(0)  # groups of meshes that are gone need no farewell


def run_all(megabytes: int, turns: int) -> list[str]:
    """Runs the benchmark; returns the lines that it prints."""
    width, context = width_for(megabytes), multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=measure, args=(rank, store, width, turns, theirs)) for rank in range(len(_RANKS))
        ]
        for each in ranks:
            each.start()
        found = ours.recv()
        for each in ranks:
            each.join()
    return [
        f"{machine()}; 4 processes over gloo, {_LAYERS} layers of {width}, tiles of 32, density {_DENSITY}",
        f"DCP on a memory disk: save {spread([turn.save for turn in found])} s, a new run "
        f"{spread([turn.making for turn in found])} s, load {spread([turn.load for turn in found])} s",
        *(line for way in WAYS for line in _lines_of(way, [turn for turn in found if turn.way == way])),
    ]


def _lines_of(way: Way, turns: list[Turn]) -> Iterator[str]:
    phases = {name: [turn.phases[name] for turn in turns] for name in turns[0].phases}
    pauses = [turn.pause for turn in turns]
    yield (
        f"{way}: prepared in {spread([turn.preparing for turn in turns])} s, then a pause of {spread(pauses)} s ("
        + ", ".join(f"{name} {spread(seconds)}" for name, seconds in phases.items())
        + f"); {turns[0].sent / 1e6:.1f} MB sent, {max(turn.over for turn in turns):.3f} of the fewest; at most "
        f"{max(turn.peak for turn in turns):.2f} times what a rank stores"
    )
    files = [(turn.save + turn.load) / turn.pause for turn in turns]
    whole = [(turn.save + turn.making + turn.load) / (turn.preparing + turn.pause) for turn in turns]
    yield f"{way}: save and load over the pause {spread(files, '.1f')}; with the new run on both sides " + (
        f"{spread(whole, '.1f')}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="state of the run, about")
    parser.add_argument("--turns", type=int, default=3, help="from four ranks to two and back, so many times")
    parser.add_argument("--paper", action="store_true", help="compute the table of 7B and 70B; nothing is measured")
    arguments = parser.parse_args()
    lines = switching_on_paper.table() if arguments.paper else run_all(arguments.megabytes, arguments.turns)
    print("\n".join(lines))
