"""Planned bytes and traffic under tensor parallelism equal those of the ranks, and what cannot be cut is refused."""

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import smet_compile as smet
from smet_compile.optim.on_arrival import UpdatesOnArrival
from smet_compile.plan.traffic import DROP_FRACTION
from smet_compile.shards import is_sharded, local
from tests.plan.test_mesh import BF16, FP32, check, optimizers_of, stored
from tests.plan.test_traffic import EVERY, GATHER, SCATTER, WEIGHTS, counted
from tests.shards.parallel import SLABS, cut_layers, dense_net, parallel_net, whole_net
from tests.shards.setting import ROWS, Net, loss_of, shard
from tests.support.ranks import processes

KINDS: dict[str, tuple[torch.dtype, Any, Any]] = {
    "single weights, fp32": (FP32, 1, None),
    "tiles, bf16": (BF16, 4, BF16),
    "runs, bf16 with fp32 moments": (BF16, (1, 4), None),
    "tiles, 8 bits": (BF16, 4, "int8"),
}
MESHES = [(2, 2), (4, 2), (4, 4)]
"""Numbers of ranks, and those of tensor parallelism among them."""
TP_PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}


def planned(model: nn.Module, dp: int, tp: int, moment_dtype: Any = None, **options: Any) -> Any:
    return smet.plan(
        model,
        batch=ROWS // dp,
        inputs=lambda batch, sequence: torch.zeros(batch, 5, dtype=torch.int64),
        loss_fn=lambda model, tokens: model(tokens).float().square().mean(),
        moment_dtype=moment_dtype,
        mesh={"dp": dp, "tp": tp},
        tp_plan=TP_PLAN,
        **({"compiled": False} | options),
    )


def planned_by_density(kind: str, dp: int, tp: int) -> Any:
    dtype, block_shape, moment_dtype = KINDS[kind]
    return planned(dense_net(dtype), dp, tp, moment_dtype, density=0.3, block_shape=block_shape, exclude="head")


def is_whole(parameter: Any) -> bool:
    """Tells whether FSDP2 has gathered a parameter, or the part of it that tensor parallelism left here."""
    return not is_sharded(parameter) or "dp" not in parameter.device_mesh.mesh_dim_names


class WholeParts:
    """Keeps the most bytes that FSDP2 has gathered while a layer runs: of weights that are cut, those of the part."""

    def __init__(self, model: Any) -> None:
        self.model, self.parameters = model, 0
        for layer in model.layers:
            layer.up.register_forward_hook(self._look)

    def _look(self, *_: Any) -> None:
        whole = [p for p in self.model.parameters() if is_whole(p)]
        self.parameters = max(self.parameters, sum(local(p).untyped_storage().nbytes() for p in whole))


def dense_parts(dtype: torch.dtype, tp: int, dp: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model: Any = cut_layers(dense_net(dtype), mesh["tp"])
    for layer in model.layers if dp > 1 else ():
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]) if dp > 1 else model


def torch_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Makes an optimizer for each mesh over which parameters are cut, which torch's own does not mix."""
    of_mesh: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        of_mesh.setdefault(str(parameter.device_mesh) if is_sharded(parameter) else "", []).append(parameter)
    return [torch.optim.AdamW(parameters, fused=True) for parameters in of_mesh.values()]


def after_a_step(rank: int, world: int, tp: int, kind: str | None, **options: Any) -> tuple[dict[str, int], int]:
    """Trains a model in parts for a step, by torch's AdamW where it is dense, which has no ``kind``."""
    dp = world // tp
    dtype, block_shape, moment_dtype = KINDS[kind] if kind else (BF16, None, None)
    if kind:
        model, _ = parallel_net(dtype, tp, dp, block_shape, fully=dp > 1, **({"slabs": None} | options))
    else:
        model = dense_parts(dtype, tp, dp)
    whole = WholeParts(model)
    optimizers = optimizers_of(model, moment_dtype) if kind else torch_optimizers(model)
    loss_of(model, 0, rank // tp, dp).backward()
    for optimizer in optimizers:
        optimizer.step()
    return stored(model, optimizers), whole.parameters if dp > 1 else 0


def with_copies(rank: int, world: int, kind: str) -> tuple[dict[str, int], int]:
    """Trains two copies of a model, each of which two ranks of tensor parallelism hold, for a step."""
    dtype, block_shape, moment_dtype = KINDS[kind]
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "dp", "tp"))
    model: Any = smet.sparsify(cut_layers(dense_net(dtype), mesh["tp"]), 0.3, block_shape=block_shape, exclude="head")
    shard(model, mesh=mesh["replicate", "dp"])
    whole = WholeParts(model)
    optimizers = optimizers_of(model, moment_dtype)
    loss_of(model, 0, rank // 2, 2).backward()
    for optimizer in optimizers:
        optimizer.step()
    return stored(model, optimizers), whole.parameters


@pytest.mark.parametrize("kind", ["single weights, fp32", "tiles, 8 bits"])
def test_bytes_of_a_rank_of_copies(kind: str) -> None:
    plan = planned_by_density(kind, 1, 2)
    cost = plan.on_mesh({"dp": 1, "replicate": 2, "tp": 2}).sparse
    processes.stop()  # torch keeps the mesh of "tp" for later ones of the same ranks, whose groups have other names
    measured = processes.run(4, with_copies, kind)
    processes.stop()
    check(cost, measured)


def with_own_slabs(rank: int, world: int, tp: int, kind: str) -> tuple[dict[str, int], int]:
    return after_a_step(rank, world, tp, kind, slabs=SLABS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "tp"), MESHES)
def test_bytes_of_a_rank_are_those_of_its_tensors(world: int, tp: int, kind: str) -> None:
    plan = planned_by_density(kind, world // tp, tp)
    check(plan.per_rank.sparse, processes.run(world, after_a_step, tp, kind))


@pytest.mark.parametrize(("world", "tp"), MESHES[:2])
def test_bytes_of_a_rank_in_dense_training(world: int, tp: int) -> None:
    cost = planned_by_density("tiles, bf16", world // tp, tp).per_rank.dense
    check(cost, processes.run(world, after_a_step, tp, None))


def test_a_model_that_is_compact_keeps_its_slabs() -> None:
    plan = planned(whole_net(FP32), 2, 2)
    check(plan.per_rank.sparse, processes.run(4, with_own_slabs, 2, "single weights, fp32"))


class AddedUp(TorchDispatchMode):
    """Counts the bytes that tensor parallelism adds up over ``parts`` ranks, as rings send them."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts, self.sent = parts, Fraction(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come here then
        if func.namespace == "_c10d_functional" and func._schema.name.endswith("::all_reduce"):
            self.sent += Fraction(2 * (self.parts - 1) * args[0].nbytes, self.parts)
        return func(*args, **(kwargs or {}))


def traffic(rank: int, world: int, tp: int, kind: str) -> tuple[Fraction, list[Counter[str]]]:
    """Returns what tensor parallelism sends in a step, and all else in a step, in that before an update, in the update.

    The update is the second, since at the first one ranks compare more.
    """
    dp = world // tp
    dtype, block_shape, moment_dtype = KINDS[kind]
    model, _ = parallel_net(dtype, tp, dp, block_shape, fully=dp > 1, slabs=None)
    optimizers = optimizers_of(model, moment_dtype)
    manager = smet.TopologyManager(
        model, optimizers, total_steps=20, every=EVERY, schedule="constant", drop_fraction=DROP_FRACTION,
        grow="gradient", min_age=0, auto_step=False,
    )  # fmt: skip
    found: list[Counter[str]] = []
    for step in range(2 * EVERY):
        with counted() as sent, AddedUp(tp) as added_up:
            loss_of(model, step, rank // tp, dp).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append(sent)
        with counted() as of_update:
            manager.step()
    assert len(manager.history) == 2
    return added_up.sent, [*found[-2:], of_update]


@pytest.mark.parametrize("kind", ["single weights, fp32", "tiles, 8 bits"])
@pytest.mark.parametrize(("world", "tp"), MESHES)
def test_traffic_of_a_rank(world: int, tp: int, kind: str) -> None:
    expected = planned_by_density(kind, world // tp, tp).per_rank.sparse.traffic
    of_update = expected.update
    for added_up, (step, before, update) in processes.run(world, traffic, tp, kind):
        assert added_up == expected.step["tensor parallel"] > 0
        assert step[GATHER] == before[GATHER] == expected.step["all-gather"]
        assert step[SCATTER] == expected.step["reduce-scatter"]
        assert step["all_reduce"] == expected.step["all-reduce"] == 0
        assert before["all_reduce"] == expected.growth
        mean_ages = WEIGHTS * 2 * (tp - 1) * 8 // tp
        assert update["all_gather"] == of_update["scores"] + of_update["bits"] + of_update["ages"] - mean_ages
        assert 0 <= update["all_reduce"] - of_update["scales"] - of_update["digests"] - mean_ages < WEIGHTS
        assert (update["all_to_all_single"] > 0) <= (world > tp)
    assert (of_update["scales"] > 0) == (KINDS[kind][2] == "int8")
    assert (of_update["rows"] > 0) == (world > tp)


def arriving(rank: int, world: int, tp: int) -> int:
    """Returns the most bytes of the memory of gradients at a time, where each is used as it arrives."""
    dp = world // tp
    model, _ = parallel_net(FP32, tp, dp, fully=dp > 1, slabs=None)
    optimizer, most = smet.ActiveAdamW(model), [0]

    def look(_: Tensor) -> None:
        reduced = [p.grad for p in model.parameters() if p.grad is not None and (dp == 1 or not is_whole(p))]
        storages = {local(grad).untyped_storage().data_ptr(): local(grad).untyped_storage() for grad in reduced}
        most[0] = max(most[0], sum(storage.nbytes() for storage in storages.values()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    updates = UpdatesOnArrival(optimizer)
    with updates.active():
        loss_of(model, 0, rank // tp, dp).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    return most[0]


@pytest.mark.parametrize(("world", "tp"), MESHES[:2])
def test_updates_in_backward_keep_the_gradients_of_one_group(world: int, tp: int) -> None:
    plan = planned(dense_net(FP32), world // tp, tp, density=0.3, exclude="head", compiled=True)
    assert processes.run(world, arriving, tp) == [plan.per_rank.sparse.stored["gradients"]] * world


def plan_of_nano(**options: Any) -> Any:
    return smet.plan("nano", 0.25, batch=3, compiled=False, **options)


def test_a_model_of_hugging_face_brings_its_plan() -> None:
    """Each layer has five matrices that read, and two that return, hidden states of 32 entries."""
    plan = plan_of_nano(mesh={"dp": 1, "tp": 2})
    hidden_states = 3 * 32 * 32 * 4
    assert plan.per_rank.sparse.traffic.step["tensor parallel"] == 2 * (5 + 2) * hidden_states
    assert plan.per_rank.dense.traffic.step["tensor parallel"] == 2 * (5 + 2) * hidden_states
    whole = plan.on_mesh({"dp": 1})
    cut = plan.per_rank
    embeddings, norms = 2 * 32_000 * 32, 5 * 32
    assert cut.dense.stored["plain parameters"] == (
        4 * (embeddings + norms) + (whole.dense.stored["plain parameters"] - 4 * (embeddings + norms)) // 2
    )
    assert 2 * cut.sparse.stored["values"] == whole.sparse.stored["values"]
    assert "a rank of dp=1,tp=2" in plan.rank_table() and "tensor parallel" in str(plan)


def test_what_is_computed_again_is_added_up_again() -> None:
    """Checkpoints compute attention's output again, and stop before the last matrix has its own."""
    once, twice = (
        plan_of_nano(mesh={"dp": 1, "tp": 2}, checkpointing=again).per_rank.sparse.traffic.step["tensor parallel"]
        for again in (False, True)
    )
    assert twice - once == 2 * (3 * 32 * 32 * 4)


def test_inputs_without_a_gradient_are_not_added_up() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    plan = smet.plan(
        model, 0.5, batch=3, compiled=False, inputs=lambda b, s: torch.zeros(b, 8), loss_fn=lambda m, x: m(x).sum(),
        mesh={"dp": 1, "tp": 4}, tp_plan={"0": "colwise", "1": "rowwise"},
    )  # fmt: skip
    assert plan.per_rank.sparse.traffic.step["tensor parallel"] == 2 * 3 * (3 * 8 * 4) // 4


def test_copies_of_parts_change_nothing_that_is_stored() -> None:
    plan = plan_of_nano(block_shape=4)
    one, two = (plan.on_mesh({"dp": 2, "tp": 2} | copies).sparse for copies in ({}, {"replicate": 2}))
    assert one.stored == two.stored
    assert two.traffic.step["all-reduce"] == one.stored["gradients"]


def test_one_rank_of_tensor_parallelism_cuts_nothing() -> None:
    plan = plan_of_nano(tp_plan=None)
    assert plan.on_mesh({"dp": 4, "tp": 1}) == plan.on_mesh({"dp": 4})


REFUSED = [
    ({"mesh": {"dp": 2, "tp": 0}}, r"mesh\['tp'\]: expected a whole number of at least 1, got 0"),
    ({"mesh": {"tp": 2}}, "mesh: expected 'dp' .* and at most 'replicate' beside it .*, got tp alone"),
    ({"mesh": {"dp": 2, "tp": 3}}, r"layers.0.up.weight: expected rows that 3 slabs .* divide, got 40"),
    ({"mesh": {"dp": 2, "tp": 4}, "block_shape": 4}, r"layers.0.up.weight: expected rows that 4 slabs of .* 4 divide"),
    ({"mesh": {"dp": 2, "tp": 3}, "exclude": "layers.*"}, r"layers.0.up.weight: expected rows that tp=3 divides"),
    ({"tp_plan": None}, "tp_plan: expected one for Net, which brings no plan .*, got none; pass globs"),
    ({"tp_plan": None, "mesh": {"dp": 2}}, None),
    ({"tp_plan": {}}, "tp_plan: expected a dict from globs over names of modules .*, got an empty one"),
    ({"tp_plan": ["up"]}, "tp_plan: expected a dict from globs over names of modules"),
    ({"tp_plan": {3: "colwise"}}, "tp_plan: expected a dict from globs over names of modules"),
    ({"tp_plan": {"*.up": "colwise"}}, r"tp_plan: '\*.up' matches none of the modules; name all of a module's path"),
    ({"tp_plan": {"layers.*.up": "sequence"}}, r"tp_plan\['layers.\*.up'\]: expected colwise or rowwise, got 'seq"),
    ({"tp_plan": {"layers.*.*": "colwise"}}, "to match nn.Linear alone, got layers.0.norm, a LayerNorm; leave it out"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_what_cannot_be_cut_is_refused(wrong: dict[str, Any], message: str | None) -> None:
    given = {
        "density": 0.3, "exclude": "head", "compiled": False, "mesh": {"dp": 2, "tp": 2}, "tp_plan": TP_PLAN,
        "inputs": lambda b, s: torch.zeros(b, 5, dtype=torch.int64),
        "loss_fn": lambda model, tokens: model(tokens).square().mean(),
    }  # fmt: skip
    model = Net(hidden=40)
    if message is None:
        assert smet.plan(model, **(given | wrong)).per_rank is not None
        return
    with pytest.raises(ValueError, match=message):
        smet.plan(model, **(given | wrong))


@pytest.mark.parametrize("slabs", [None, {"*.up": (4, 0)}, {"*.up": (3, 0), "*.down": (3, 1)}])
def test_a_model_that_is_compact_needs_slabs_that_the_ranks_share(slabs: Any) -> None:
    model = whole_net(FP32, slabs=slabs)
    with pytest.raises(
        ValueError, match=r"layers.0.(up|down).weight: expected slabs along dimension [01] whose number"
    ):
        planned(model, 1, 2)
