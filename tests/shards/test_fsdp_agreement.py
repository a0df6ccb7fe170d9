"""Ranks that do not hold one model, or do not act alike, get an error that says so; what they send is counted."""

from datetime import timedelta
from typing import Any, ClassVar

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.shards.setting import Net, put_gradients, shard, sparse_net
from tests.support.ranks import processes


def update_with(rank: int, world: int, change: str, **options_of_shards: Any) -> str:
    """Makes a topology update; the last rank differs by ``change``. Returns the error, whether anything changed."""
    last = rank == world - 1
    seed = 1 if last and change == "seed of sparsify" else 0
    model = shard(sparse_net(torch.float32, seed=seed), **options_of_shards)
    optimizer = smet.ActiveAdamW(model, 1e-2)
    options = {"seed": 1} if last and change == "seed of the manager" else {}
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=2, auto_step=False, **options)
    before = {name: site.compact.topology.clone() for name, site in find_sites(model).items()}
    for step in range(2):
        put_gradients(model, step)
        optimizer.step()
        if change == "a call too few" and last and step == 1:
            return "rank left"
        try:
            manager.step()
        except (ValueError, RuntimeError) as error:
            changed = any(not torch.equal(site.compact.topology, before[n]) for n, site in find_sites(model).items())
            return f"{'changed: ' if changed else ''}{error}"
    return "no error"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("nothing", "no error"),
        ("seed of sparsify", "layers.0.up.weight: expected the same on all 3 ranks"),
        ("seed of the manager", "TopologyManager: expected the same on all 3 ranks"),
    ],
)
def test_ranks_that_differ_are_told_before_anything_changes(change: str, expected: str) -> None:
    for message in processes.run(3, update_with, change):
        assert message.startswith(expected)


def a_call_too_few(rank: int, world: int) -> str:
    group = distributed.new_group(timeout=timedelta(seconds=3))
    return update_with(rank, world, "a call too few", mesh=DeviceMesh.from_group(group, "cpu"))


def test_a_rank_that_does_not_come_is_an_error_that_names_the_collective() -> None:
    processes.stop()  # torch keeps a mesh for later ones of the same ranks, whose group this test replaces
    messages = processes.run(2, a_call_too_few)
    processes.stop()
    assert "comparing the ranks failed" in messages[0]


def two_dtypes(rank: int, world: int) -> str:
    model = sparse_net(torch.bfloat16)
    model.layers[1].norm.to(torch.float32)
    shard(model)
    try:
        smet.ActiveAdamW(model, 1e-2)
    except ValueError as error:
        return str(error)
    return ""


def test_two_dtypes_in_one_group_are_refused() -> None:
    for message in processes.run(2, two_dtypes):
        assert "expected torch.float32 like layers.1.norm.weight" in message and "fully_shard" in message


class CountedBytes(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives."""

    INPUTS: ClassVar = {
        "_allgather_base_": 1,
        "_reduce_scatter_base_": 1,
        "allreduce_": 0,
        "allgather_": 1,
        "alltoall_base_": 1,
    }

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            inputs = args[self.INPUTS[func._schema.name.removeprefix("c10d::")]]
            self.total += sum(tensor.nbytes for tensor in tree_leaves(inputs))
        return func(*args, **(kwargs or {}))


def traffic(rank: int, world: int, density: float | None) -> Any:
    """Returns the bytes of a step, and of an update, of a model whose parameters are mostly in linear layers."""
    torch.manual_seed(0)
    model = Net(width=64, vocabulary=2)
    if density is not None:
        smet.sparsify(model, density, exclude="head")
    shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if density is None else smet.ActiveAdamW(model, 1e-2)
    manager = (
        None if density is None else smet.TopologyManager(model, optimizer, auto_step=False, total_steps=10, every=2)
    )
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    of_steps = []
    for _ in range(2):
        with CountedBytes() as sent:
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        of_steps.append(sent.total)
        if manager is not None and len(of_steps) < 2:
            manager.step()
    with CountedBytes() as sent:
        if manager is not None:
            manager.step()
    return of_steps[1], sent.total


def test_traffic_is_that_of_dense_training_times_the_density() -> None:
    dense, _ = processes.run(2, traffic, None)[0]
    step, update = processes.run(2, traffic, 0.25)[0]
    assert step / dense <= 0.25 + 0.02
    assert update / (100 * step) < 0.01
