"""Models that tensor parallelism cuts compile, step, clip, start and export as others; misuse is refused."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import smet_compile as smet
from smet_compile.ops import find_sites, saved_weights
from smet_compile.shards import local
from smet_compile.tracing import Capture
from tests.shards.parallel import SLABS, cut_layers, dense_net, dense_weights, parallel_net, whole_net
from tests.shards.setting import Net, loss_of, shard, train_steps
from tests.support.ranks import processes


def kept_by_autograd(rank: int, world: int) -> tuple[Counter[str], set[str]]:
    """Counts the saved tensors of a forward: weights that are kept as recipes, and others of a weight's size."""
    model, _ = parallel_net(torch.float32, 2)
    sizes = {site.layout.num_weights for site in find_sites(model).values()}
    found: Counter[str] = Counter()
    pack = saved_weights._Hooks.pack

    def counting(hooks: Any, tensor: Tensor) -> Any:
        kept = pack(hooks, tensor)
        if isinstance(kept, saved_weights._Kept):
            found["recipe"] += 1
        elif tensor.dim() == 2 and local(tensor).numel() in sizes and set(local(tensor).shape) == {20, 24}:
            found["dense"] += 1
        return kept

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saved_weights._Hooks, "pack", counting)
        loss = loss_of(model, 0, 0, 1)
    loss.backward()
    return found, {name for name, site in find_sites(model).items() if site.values.grad is None}


def test_backward_keeps_no_dense_slab() -> None:
    for found, without_gradient in processes.run(2, kept_by_autograd):
        assert found == {"recipe": 4} and not without_gradient


def stepped(rank: int, world: int, tp: int, compiled: str) -> list[float]:
    """Trains with compiled blocks, or with the update in backward, or with clipping; returns the losses."""
    dp = world // tp
    if world == 1:
        model = whole_net(torch.float64)
    else:
        model, mesh = parallel_net(torch.float64, tp, dp)
        for layer in model.layers:
            if compiled == "blocks":
                layer.compile(fullgraph=True, backend=Capture())
            if dp > 1:
                fully_shard(layer, mesh=mesh["dp"])
        if dp > 1:
            fully_shard(model, mesh=mesh["dp"])
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=2, schedule="cosine")
    number, of = rank // tp, dp
    if compiled == "blocks":
        return train_steps((model, optimizer, manager), range(6), number, of)
    clip = 0.1 if compiled == "clip" else None
    step = smet.compile_train_step(
        model, optimizer, lambda model, step: loss_of(model, step, number, of), max_grad_norm=clip
    )
    step.compile(backend="eager")
    losses = []
    for number_of_step in range(6):
        loss = step(number_of_step).double()
        torch.distributed.all_reduce(loss)
        losses.append(float(loss / world))
        manager.step()
    assert len(manager.history) == 3
    return losses


@pytest.mark.parametrize("compiled", ["blocks", "update", "clip"])
def test_compiled_steps_are_those_of_one_process(compiled: str) -> None:
    expected = processes.run(1, stepped, 1, "clip" if compiled == "clip" else "blocks")[0]
    for world, tp in ((2, 2), (4, 2)):
        for losses in processes.run(world, stepped, tp, compiled):
            torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def replicated(rank: int, world: int) -> tuple[list[float], list[float]]:
    """Returns losses of two copies of a model whose layers are cut in two, and those of one process."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "dp", "tp"))
    model = cut_layers(dense_net(torch.float64), mesh["tp"])
    smet.sparsify(model, 0.3, exclude="head", slabs=SLABS)
    shard(model, mesh=mesh["replicate", "dp"])
    losses = []
    for each, number, of in ((model, rank // 2, 2), (whole_net(torch.float64), 0, 1)):
        optimizer = smet.ActiveAdamW(each, 1e-2)
        manager = smet.TopologyManager(
            each, optimizer, total_steps=40, every=2, schedule="cosine", grow="gradient", min_age=2
        )
        losses.append(train_steps((each, optimizer, manager), range(7), number, of))
        assert len(manager.history) == 3
    return losses[0], losses[1]


def test_copies_of_cut_layers_train_as_one_process() -> None:
    processes.stop()  # torch keeps meshes of the same ranks
    for losses, expected in processes.run(4, replicated):
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def compiled_graphs(rank: int, world: int, tp: int) -> tuple[Counter[str], int, int]:
    """Returns the ops in the graphs of a layer, the sizes of slabs among saved tensors, and the number of graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, mesh = parallel_net(torch.float32, tp, world // tp, block_shape=4)
    capture = Capture()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=capture)
        if world > tp:
            fully_shard(layer, mesh=mesh["dp"])
    if world > tp:
        fully_shard(model, mesh=mesh["dp"])
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=2, schedule="cosine")
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train_steps((model, optimizer, manager), range(7), rank // tp, world // tp)
    assert len(manager.history) == 3
    sizes = {site.layout.num_weights for site in find_sites(model).values()}
    ops: Counter[str] = Counter()
    for graph in capture.graphs:
        for half in (graph.forward, graph.backward):
            ops.update(str(node.target) for node in half.graph.nodes if "smet" in str(node.target))
    return ops, sum(size in sizes for size in saved), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("world", "tp"), [(2, 2), (4, 2)])
def test_compiled_layers_multiply_with_values_and_save_no_slab(world: int, tp: int) -> None:
    for ops, num_saved, num_graphs in processes.run(world, compiled_graphs, tp):
        assert ops == {"smet.masked_matmul.default": 4 * num_graphs, "smet.sampled_matmul.default": 2 * num_graphs}
        assert num_saved == 0
        assert num_graphs <= 2  # one for both layers, or one each; none for a new topology


def norms(rank: int, world: int, fully: bool) -> list[float]:
    """Returns norms of gradients of a model in parts, then those of the whole model, and the norm after clipping."""
    found = []
    for model in (parallel_net(torch.float64, 2, world // 2, fully=fully)[0], whole_net(torch.float64)):
        loss_of(model, 0, 0, 1).backward()
        found += [float(smet.clip_grad_norm_(model, 1e9, p)) for p in (1.0, 2.0, float("inf"))]
        smet.clip_grad_norm_(model.parameters(), 0.5)
        found.append(float(smet.clip_grad_norm_(model, 1e9)))
    return found


@pytest.mark.parametrize(("world", "fully"), [(2, False), (4, True)])
def test_norms_count_each_part_once(world: int, fully: bool) -> None:
    for found in processes.run(world, norms, fully):
        torch.testing.assert_close(found[:4], found[4:], rtol=0, atol=1e-12)
        assert abs(found[3] - 0.5) < 1e-5


def from_meta(rank: int, world: int, tp: int) -> dict[str, Tensor]:
    """Returns the weights of a model that began on the meta device."""
    with torch.device("meta"):
        model = Net(hidden=48)
    if world > 1:
        mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
        cut_layers(model, mesh["tp"])
    smet.sparsify(model, 0.3, block_shape=4, exclude="head", slabs=SLABS)
    if world > tp:
        shard(model, mesh=mesh["dp"])
    smet.materialize(model, seed=3)
    return dense_weights(model)


def test_a_start_without_a_whole_model_does_not_depend_on_the_ranks() -> None:
    expected = processes.run(1, from_meta, 1)[0]
    for world, tp in ((2, 2), (4, 2), (4, 4)):
        got = processes.run(world, from_meta, tp)[0]
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items()), (world, tp)


def all_sum(tensor: Tensor) -> Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def looked_at(rank: int, world: int) -> dict[str, Any]:
    model, _ = parallel_net(torch.float32, 2)
    weight = model.layers[0].down.weight
    with torch.no_grad():
        changed = model.layers[1].up.weight
        changed.mul_(2)
        product = nn.functional.linear(torch.ones(1, 20), local(changed))
        with torch.enable_grad():
            x = DTensor.from_local(torch.ones(1, 20), changed.device_mesh, [Replicate()]).requires_grad_()
            nn.functional.linear(x, changed).sum().backward()
            gradient = x.grad.full_tensor().sum()
        model.layers[0].up.weight.mul_(2)
        model.layers[0].down.weight = weight * 3
    exported = smet.export_dense(model)
    whole = whole_net(torch.float32)
    expected = smet.export_dense(whole)
    return {
        "shape": tuple(weight.shape),
        "placements": str(weight.placements),
        "used after a change": torch.allclose(gradient, all_sum(product.sum())),
        "in place": torch.equal(exported.layers[0].up.weight, 2 * expected.layers[0].up.weight),
        "assigned": torch.equal(exported.layers[0].down.weight, 3 * expected.layers[0].down.weight),
        "plain": not any(isinstance(p, DTensor) for p in exported.parameters())
        and not exported.layers[0].up._forward_hooks,
        "runs": bool(exported(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()),
        "masks": all(torch.equal(mask, smet.masks(whole)[name]) for name, mask in smet.masks(model).items()),
        "density": smet.report(model).density == smet.report(whole).density,
        "copied": len(find_sites(copy.deepcopy(whole))),
    }


def test_weights_read_and_write_as_those_of_torch() -> None:
    for found in processes.run(2, looked_at):
        assert found == {
            "shape": (20, 48),
            "placements": "(Shard(dim=1),)",
            **dict.fromkeys(("used after a change", "in place", "assigned", "plain", "runs", "masks", "density"), True),
            "copied": 4,
        }


def refusals(rank: int, world: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    reverse = DeviceMesh("cpu", list(reversed(range(world))), mesh_dim_names=("tp",))
    found = {}

    def attempt(name: str, model: nn.Module, **options: Any) -> None:
        try:
            smet.sparsify(model, options.pop("density", 0.3), **options)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)

    attempt("slabs of another dim", cut_layers(dense_net(torch.float32), mesh), slabs={"*.up": (2, 1)})
    attempt("odd slabs", cut_layers(dense_net(torch.float32), mesh), slabs={"*.up": (3, 0)})
    attempt("blocks across", cut_layers(dense_net(torch.float32), mesh), block_shape=16)
    attempt("nonzero", cut_layers(dense_net(torch.float32), mesh), density=None, select="nonzero")
    attempt("reverse", cut_layers(dense_net(torch.float32), reverse))
    attempt("no such weight", dense_net(torch.float32), slabs={"*.other": (2, 0)})
    attempt("no pair", dense_net(torch.float32), slabs={"*.up": 2})
    replicated = parallelize_module(dense_net(torch.float32).layers[0].up, mesh, ColwiseParallel())
    replicated.weight = nn.Parameter(DTensor.from_local(torch.randn(48, 20), mesh, [Replicate()]))
    attempt("replicated", nn.Sequential(replicated))
    whole = shard(whole_net(torch.float32), mesh=mesh)
    attempt("after fully_shard", whole)
    parts = cut_layers(dense_net(torch.float32), mesh)
    smet.sparsify(parts, 0.3, include="*.up")
    loss_of(parts, 0, 0, 1).backward()
    try:
        smet.ActiveScale(parts, 0.1).step()
    except ValueError as error:
        found["columns"] = str(error)
    try:
        smet.correct_gradients(parts, smet.ActiveSGD(parts, 0.1))
    except ValueError as error:
        found["corrected"] = str(error)
    return found


def test_refusals_say_what_to_do() -> None:
    for found in processes.run(2, refusals):
        assert "expected slabs along dimension 0" in found["slabs of another dim"]
        assert "expected slabs along dimension 0 whose number 2 divides" in found["odd slabs"]
        assert "whole blocks of 16" in found["blocks across"]
        assert found["nonzero"].startswith("slabs: expected none")
        assert "ranks ascend" in found["reverse"]
        assert found["no such weight"].startswith("slabs: '*.other' matches none")
        assert found["no pair"].startswith("slabs['*.up']: expected slabs (count, dim)")
        assert "cuts by rows or by columns" in found["replicated"]
        assert found["after fully_shard"]
        assert "got a part of one" in found["corrected"]
        assert "layers.0.down.weight: expected a weight with whole rows for the rule scale" in found["columns"]
    processes.stop()  # the mesh of descending ranks made a group
