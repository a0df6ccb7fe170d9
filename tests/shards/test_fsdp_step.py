"""Compiled layers and the compiled step of sharded models: right, with compact gradients of one module at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.shards import local
from smet_compile.tracing import Capture
from tests.shards.setting import loss_of, mean_over_ranks, shard, sparse_net, topologies
from tests.support.ranks import processes

STEPS = 8


def make(compiled: bool = False, grow: str = "random", **options: Any) -> Any:
    model = sparse_net(torch.float32, 4)
    if compiled:
        for layer in model.layers:
            layer.compile(fullgraph=True, backend=Capture())
    shard(model)
    optimizer = smet.ActiveAdamW(model, 3e-3, warmup_steps=5)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=3, grow=grow, schedule="cosine")
    return model, optimizer, manager


def plain_run(rank: int, world: int, compiled: bool = False, grow: str = "random", clip: float | None = None) -> Any:
    model, optimizer, manager = make(compiled, grow)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, step, rank, world)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        losses.append(mean_over_ranks(loss))
    return losses, topologies(model), len(manager.history)


def compiled_run(rank: int, world: int, grow: str) -> Any:
    """Returns what ``plain_run`` does, with compiled layers, the sizes saved for backward and the number of graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dense_sizes = {site.layout.num_weights for site in find_sites(sparse_net(torch.float32, 4)).values()}
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = plain_run(rank, world, compiled=True, grow=grow)
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return *result, sorted(dense_sizes & set(saved)), num_graphs


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_compiled_layers_train_alike_and_save_no_dense_weight(grow: str) -> None:
    losses, topology, num_updates = processes.run(2, plain_run, False, grow)[0]
    got_losses, got_topology, got_updates, dense_sizes, num_graphs = processes.run(2, compiled_run, grow)[0]
    torch.testing.assert_close(got_losses, losses, rtol=0, atol=1e-5)
    assert num_updates == got_updates == 2
    assert all(torch.equal(got_topology[name], bits) for name, bits in topology.items())
    assert dense_sizes == []
    assert num_graphs <= (2 if grow == "random" else 4)  # with and without the collected gradient


def step_run(rank: int, world: int, options: dict[str, Any]) -> Any:
    """Returns losses, topologies, whether updates are made in backward, and the most gradient bytes over all bytes."""
    torch._dynamo.reset()
    model, optimizer, manager = make()
    step = smet.compile_train_step(
        model, optimizer, lambda model, number: loss_of(model, number, rank, world), **options
    )
    step.compile(backend="eager")
    most = 0

    def measure(parameter: Tensor) -> None:
        nonlocal most
        most = max(most, sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(measure)
    losses = []
    for number in range(STEPS):
        losses.append(mean_over_ranks(step(number)))
        manager.step()
    total = sum(local(p).nbytes for p in model.parameters())
    return losses, topologies(model), step.fused, most / total


def test_a_step_updates_each_parameter_when_its_gradient_is_reduced() -> None:
    losses, topology, _ = processes.run(2, plain_run)[0]
    got_losses, got_topology, fused, most = processes.run(2, step_run, {})[0]
    assert got_losses == losses and fused
    assert all(torch.equal(got_topology[name], bits) for name, bits in topology.items())
    assert most < 0.4  # the gradients of one of three modules


def test_a_step_that_clips_keeps_gradients() -> None:
    losses, topology, _ = processes.run(2, plain_run, False, "random", 0.05)[0]
    got_losses, got_topology, fused, most = processes.run(2, step_run, {"max_grad_norm": 0.05})[0]
    torch.testing.assert_close(got_losses, losses, rtol=0, atol=1e-6)
    assert not fused and most > 0.9
    assert all(torch.equal(got_topology[name], bits) for name, bits in topology.items())


def stale(rank: int, world: int, reshard_after_forward: bool) -> str:
    """Returns the error of a backward whose weights were stepped after their forward."""
    model = shard(sparse_net(), reshard_after_forward=reshard_after_forward)
    optimizer = smet.ActiveAdamW(model, 1e-2)
    loss_of(model, 0, rank, world).backward()
    late = loss_of(model, 1, rank, world)
    optimizer.step()
    try:
        late.backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_a_step_between_forward_and_backward_is_noticed(reshard_after_forward: bool) -> None:
    for message in processes.run(2, stale, reshard_after_forward):
        assert "changed" in message
    processes.stop()  # the backward was broken off
