"""A run changes its layout between steps: its state stays bit for bit, its losses those of a run that stayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

import smet_compile as smet
from benchmarks.switching import load, save
from smet_compile.distributed import Blueprint, Run, SwitchOptions, SwitchPlan, switch
from smet_compile.distributed.transfer import WAYS
from smet_compile.ops import find_sites
from smet_compile.shards import make_whole
from smet_compile.tracing import Capture
from tests.shards.parallel import SLABS, cut_layers
from tests.shards.setting import Net, loss_of, shard
from tests.support.ranks import processes

Layout = tuple[str, Any]
"""Kind and ranks: "fsdp", "hsdp", "tp" (over the last dimension) of a mesh; "ddp", or "whole" on one rank."""
SEQUENCE: list[tuple[Layout, int]] = [
    (("fsdp", [0, 1, 2, 3]), 3),
    (("fsdp", [0, 1]), 6),
    (("hsdp", [[0, 1], [2, 3]]), 9),
    (("tp", [[0, 1], [2, 3]]), 12),
    (("fsdp", [0, 2, 3]), 15),
    (("tp", [[0, 2], [1, 3]]), 18),
    (("ddp", [0, 1, 2, 3]), 21),
    (("whole", [2]), 24),
    (("fsdp", [0, 1, 2, 3]), 27),
]
CHUNK = 4096
NAMES = {"fsdp": ("dp",), "hsdp": ("replicate", "dp"), "tp": ("dp", "tp"), "ddp": ("dp",), "whole": ("dp",)}
KINDS: dict[str, tuple[torch.dtype, Any, dict[str, Any]]] = {
    "single weights": (torch.float64, 1, {}),
    "tiles": (torch.float32, 4, {}),
    "runs, bf16": (torch.bfloat16, (1, 4), {"moment_dtype": torch.bfloat16}),
    "tiles, 8-bit moments": (torch.bfloat16, 4, {"moment_dtype": "int8"}),
    "tiles, compiled": (torch.float32, 4, {"compiled": True}),
}


def mesh_of(layout: Layout) -> DeviceMesh:
    kind, ranks = layout
    return DeviceMesh("cpu", ranks, mesh_dim_names=NAMES[kind])


def builder(
    kind: str, dtype: torch.dtype, block_shape: Any, compiled: bool = False
) -> Callable[[DeviceMesh], nn.Module]:
    def build(mesh: DeviceMesh) -> nn.Module:
        with torch.device("meta"):
            model = Net(hidden=48).to(dtype)
        if kind == "tp":
            cut_layers(model, mesh["tp"])
        smet.sparsify(model, 0.3, block_shape=block_shape, exclude="head", slabs=SLABS)
        for layer in model.layers if compiled else ():
            layer.compile(fullgraph=True, backend=Capture())
        if kind not in ("whole", "ddp"):
            shard(model, mesh=mesh["dp"] if kind == "tp" else mesh)
        return model

    return build


def optimizing(options: dict[str, Any]) -> Callable[[nn.Module], Any]:
    def optimize(model: nn.Module) -> Any:
        if options.get("moment_dtype") == "int8":  # codes of dense weights would be cut within their groups
            sites = {id(site.values) for site in find_sites(model).values()}
            ours, others = ([p for p in model.parameters() if (id(p) in sites) is own] for own in (True, False))
            optimizer = smet.ActiveAdamW(ours, 3e-3, model=model, warmup_steps=5, **options)
            several = [optimizer, torch.optim.AdamW(others, 3e-3)]
            return several, smet.TopologyManager(model, optimizer, total_steps=60, every=4, schedule="cosine")
        optimizer = smet.ActiveAdamW(model, 3e-3, warmup_steps=5, **options)
        return optimizer, smet.TopologyManager(model, optimizer, total_steps=60, every=4, schedule="cosine")

    return optimize


def blueprint(kind: str, dtype: torch.dtype, block_shape: Any, options: dict[str, Any]) -> Blueprint:
    options = dict(options)
    build = builder(kind, dtype, block_shape, options.pop("compiled", False))
    return Blueprint(build, optimizing(options), in_ddp if kind == "ddp" else None)


def in_ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())


def whole_state(run: Run | None) -> dict[str, Tensor]:
    """Returns all tensors of a run whole, in the order of whole weights; the ranks of the run ask together."""
    if run is None:
        return {}
    sites = {id(site.values): site for site in find_sites(run.model).values()}
    states: dict[int, dict[str, Tensor]] = {}
    found = {}
    for optimizer in run.optimizers:
        saved, parameters = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        states |= {id(p): saved["state"].get(number, {}) for p, number in zip(parameters, numbers, strict=True)}
    for name, parameter in run.model.named_parameters():
        site = sites.get(id(parameter))
        for key, tensor in {"": parameter.detach(), **states[id(parameter)]}.items():
            whole = make_whole(tensor)
            if site is not None and site.part is not None and whole.dim() and key not in ("births", "scales"):
                whole = site.part.in_order(whole, site.bits_of_whole(site.compact.topology))
            found[f"{name} {key}"] = whole.clone()
        if site is not None:
            found[f"{name} topology"] = site.bits_of_whole(site.compact.topology).clone()
    return found


def most_stored(plan: SwitchPlan, state: dict[str, Tensor], rank: int) -> int:
    """Returns the bytes that a rank may store: one layout, a chunk that is sent and received, the largest tensor."""
    largest = max(each.nbytes for each in state.values())
    return max(plan.stored_before[rank], plan.stored_after[rank]) + 2 * CHUNK + largest


def reader_of(layout: Layout) -> tuple[int, int]:
    """Returns which share of a batch this rank reads, and of how many."""
    kind, ranks = layout
    table = torch.tensor(ranks)
    is_here = table == distributed.get_rank()
    if kind == "tp":
        return int(is_here.nonzero()[0, 0]), table.shape[0]
    return int(is_here.flatten().nonzero()), table.numel()


def from_first_of(mesh: DeviceMesh, value: Any) -> Any:
    box = [value]
    distributed.broadcast_object_list(box, src=int(mesh.mesh.min()))
    return box[0]


def lived(rank: int, world: int, name: str, moves: bool) -> tuple[list[float], int, list[str]]:
    """Trains through the sequence, or in its first layout alone; returns losses, updates and what a switch changed."""
    dtype, block_shape, options = KINDS[name]
    layout, until = SEQUENCE[0]
    mesh = mesh_of(layout)
    run = blueprint(layout[0], dtype, block_shape, options).begin(mesh)
    losses, step, wrong = [], 0, []
    for number, (layout, until) in enumerate(SEQUENCE):
        if number and moves:
            before, old, new = whole_state(run), mesh, mesh_of(layout)
            prepared = blueprint(layout[0], dtype, block_shape, options).prepare(new)
            switched = switch(run, prepared, SwitchOptions(number % 3 == 0, CHUNK, WAYS[number % 2]))
            assert switched.plan.total_sent == switched.plan.lower_bound
            run, mesh = switched.run, new
            after, before = whole_state(run), from_first_of(old, before)
            assert number % 3 == 0 or switched.meter.peak <= most_stored(switched.plan, before, rank)
            wrong += [f"{layout}: {key}" for key in after if not torch.equal(before[key], after[key])]
            wrong += [f"{layout}: {key}" for key in before if run is not None and key not in after]
        of_steps = []
        if run is not None:
            at = layout if moves else SEQUENCE[0][0]
            for number_of_step in range(step, until):
                loss = loss_of(run.forward, number_of_step, *reader_of(at))
                loss.backward()
                for optimizer in run.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                run.manager.step()
                of_steps.append(loss.detach().double())
        step = until
        losses += mean_over(mesh, of_steps, until - len(losses))
    events = from_first_of(mesh, None if run is None else len(run.manager.history))
    return losses, events, wrong


def mean_over(mesh: DeviceMesh, losses: list[Tensor], count: int) -> list[float]:
    """Returns the means of the losses over the ranks of a mesh; all ranks call."""
    total = torch.stack(losses) if losses else torch.zeros(count, dtype=torch.float64)
    distributed.all_reduce(total)
    return (total / mesh.mesh.numel()).tolist()


SLOW = ("tiles", "runs, bf16")  # compiled tiles and bf16 tiles go through the same layouts


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KINDS]
)
def test_a_run_goes_through_nine_layouts(name: str) -> None:
    processes.stop()  # torch keeps meshes of the same ranks, whose groups are gone
    stayed, events, _ = processes.run(4, lived, name, False)[0]
    processes.stop()
    for losses, num_updates, wrong in processes.run(4, lived, name, True):
        assert wrong == []
        assert num_updates == events == 6
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[KINDS[name][0]]
        torch.testing.assert_close(losses, stayed, rtol=0, atol=tolerance)
    processes.stop()


def by_a_checkpoint(rank: int, world: int, folder: str) -> list[str]:
    """Goes from four ranks to two by a switch, and by DCP; returns where the states differ."""
    plan = blueprint("fsdp", torch.float32, 4, {})
    run = plan.begin(mesh_of(("fsdp", [0, 1, 2, 3])))
    assert run is not None
    for step in range(9):
        loss_of(run.forward, step, rank, world).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.manager.step()
    save(run, Path(folder))
    new = mesh_of(("fsdp", [0, 1]))
    switched = switch(run, plan.prepare(new)).run
    loaded = plan.begin(new)
    load(loaded, Path(folder))
    mine, theirs = whole_state(switched), whole_state(loaded)
    assert mine.keys() == theirs.keys() and (rank > 1 or mine)
    return [key for key in mine if not torch.equal(mine[key], theirs[key])]


def test_a_checkpoint_brings_what_a_switch_brings(tmp_path: Path) -> None:
    processes.stop()
    assert processes.run(4, by_a_checkpoint, str(tmp_path)) == [[]] * 4
    processes.stop()


def refused(rank: int, world: int) -> list[str]:
    """Returns the errors of switches to models that are not that of the run, and whether it trains on."""
    mesh, found = mesh_of(("fsdp", [0, 1])), []
    run = Blueprint(builder("fsdp", torch.float64, 1), optimizing({})).begin(mesh)
    assert run is not None
    model = run.model
    loss_of(model, 0, rank, world).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    before = whole_state(run)

    def wider(mesh: DeviceMesh) -> nn.Module:
        with torch.device("meta"):
            other = Net(hidden=52).double()
        return shard(smet.sparsify(other, 0.3, exclude="head", slabs=SLABS), mesh=mesh)

    def without_slabs(mesh: DeviceMesh) -> nn.Module:
        with torch.device("meta"):
            other = Net(hidden=48).double()
        return shard(smet.sparsify(other, 0.3, exclude="head"), mesh=mesh)

    def renamed(mesh: DeviceMesh) -> nn.Module:
        with torch.device("meta"):
            other = Net(hidden=48).double()
        other.output = other.head
        del other.head
        return shard(smet.sparsify(other, 0.3, exclude="output", slabs=SLABS), mesh=mesh)

    def with_other_seed(model: nn.Module) -> Any:
        optimizer = smet.ActiveAdamW(model, 3e-3, warmup_steps=5)
        return optimizer, smet.TopologyManager(model, optimizer, total_steps=60, every=4, schedule="cosine", seed=5)

    def in_two_groups(model: nn.Module) -> Any:
        groups = [{"params": list(model.head.parameters())}, {"params": list(model.layers.parameters())}]
        optimizer = smet.ActiveAdamW(groups, 3e-3, model=model)
        return optimizer, smet.TopologyManager(model, optimizer, total_steps=60, every=4, schedule="cosine")

    same, alike = builder("fsdp", torch.float64, 1), optimizing({})
    others = [(build, alike) for build in (wider, without_slabs, builder("fsdp", torch.float32, 1), renamed)]
    for build, optimize in [*others, (same, with_other_seed), (same, in_two_groups)]:
        try:
            options = SwitchOptions(keep_source=build is same)
            switch(run, Blueprint(build, optimize).prepare(mesh_of(("fsdp", [0, 1]))), options)
        except ValueError as error:
            found.append(str(error))
    after = whole_state(run)
    found.append("as it was" if all(torch.equal(before[key], after[key]) for key in before) else "changed")
    loss_of(model, 1, rank, world).backward()
    run.optimizer.step()
    return found


def test_another_model_is_refused_and_the_run_goes_on() -> None:
    processes.stop()
    for wider, slabs, dtype, name, seed, groups, state in processes.run(2, refused):
        assert "expected the same tensors in both, got one that only" in name and ("head" in name or "output" in name)
        assert "seed" in seed and "expected the parameter groups of the run, got others" in groups
        assert wider.startswith("layers.0.up.") and "as in the run" in wider
        assert "sparsify with the same block_shape and slabs" in slabs
        assert "expected torch.float64 of shape" in dtype and "got torch.float32" in dtype
        assert state == "as it was"
    processes.stop()
