"""Planned bytes of a rank equal, kind by kind, those of the tensors on the ranks after a real step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.optim.on_arrival import UpdatesOnArrival
from smet_compile.plan.per_rank import RankCost
from smet_compile.shards import is_sharded, local
from tests.shards.setting import ROWS, Net, loss_of, shard, sparse_net
from tests.support.ranks import processes

FP32, BF16 = torch.float32, torch.bfloat16
KINDS: dict[str, tuple[torch.dtype, Any, Any]] = {
    "single weights, fp32": (FP32, 1, None),
    "tiles, bf16": (BF16, 4, BF16),
    "runs, bf16 with fp32 moments": (BF16, (1, 5), None),
    "tiles, 8 bits": (BF16, 4, "int8"),
}
SLOTS = ("exp_avg", "exp_avg_sq")


def planned(model: nn.Module, world: int, moment_dtype: Any = None, **options: Any) -> Any:
    return smet.plan(
        model,
        batch=ROWS // world,
        inputs=lambda batch, sequence: torch.zeros(batch, 5, dtype=torch.int64),
        loss_fn=lambda model, tokens: model(tokens).float().square().mean(),
        moment_dtype=moment_dtype,
        mesh={"dp": world},
        **({"compiled": False} | options),
    )


def optimizers_of(model: nn.Module, moment_dtype: Any) -> list[torch.optim.Optimizer]:
    """Makes one optimizer, or two where tiles alone have codes of 8 bits."""
    if moment_dtype != "int8":
        return [smet.ActiveAdamW(model, moment_dtype=moment_dtype)]
    tiles = [site.values for site in find_sites(model).values()]
    others = [p for p in model.parameters() if all(p is not values for values in tiles)]
    return [
        smet.ActiveAdamW(tiles, model=model, moment_dtype="int8"),
        smet.ActiveAdamW(others, model=model, moment_dtype=BF16),
    ]


class WholeBytes:
    """Keeps the most bytes that whole parameters take while a layer runs, and the most gradients that they have."""

    def __init__(self, model: Any) -> None:
        self.model, self.parameters = model, 0
        for layer in model.layers:
            layer.up.register_forward_hook(self._look)

    def _look(self, *_: Any) -> None:
        whole = [p for p in self.model.parameters() if not is_sharded(p)]
        self.parameters = max(self.parameters, sum(p.untyped_storage().nbytes() for p in whole))


def stored(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, int]:
    """Counts the bytes on this rank by kind, before gradients are let go."""
    sites = find_sites(model).values()
    compact = {id(site.values) for site in sites}
    ours = {id(buffer) for site in sites for buffer in site.compact.buffers()}
    found = {
        "values": sum(local(p).nbytes for p in model.parameters() if id(p) in compact),
        "plain parameters": sum(local(p).nbytes for p in model.parameters() if id(p) not in compact),
        "gradients": sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None),
        "bits": sum(site.compact.topology.nbytes for site in sites),
        "lists": sum(site.compact.lists.nbytes for site in sites),
        "own rows": 0,
        "buffers": sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in ours),
        "scales": 0,
        "ages": 0,
    }
    for site in sites:
        own = site.topology_of(site.rows.here)
        found["own rows"] += own.bits.nbytes + own.lists.nbytes if own is not site.compact.active else 0
    for key, tensor in (item for each in optimizers for state in each.state.values() for item in state.items()):
        kind = key if key in (*SLOTS, "scales") else "ages"
        found[kind] = found.get(kind, 0) + local(tensor).nbytes
    return found


def after_a_step(rank: int, world: int, kind: str | None) -> tuple[dict[str, int], int]:
    """Trains a sharded model for a step, by torch's AdamW where it is dense, which has no ``kind``."""
    dtype, block_shape, moment_dtype = KINDS[kind] if kind else (BF16, None, None)
    model: Any = shard(sparse_net(dtype, block_shape) if kind else Net().to(dtype))
    whole = WholeBytes(model)
    optimizers = optimizers_of(model, moment_dtype) if kind else [torch.optim.AdamW(model.parameters(), fused=True)]
    loss_of(model, 0, rank, world).backward()
    for optimizer in optimizers:
        optimizer.step()
    return stored(model, optimizers), whole.parameters


def check(cost: RankCost, measured: list[tuple[dict[str, int], int]]) -> None:
    most = {kind: max(of_rank[kind] for of_rank, _ in measured) for kind in measured[0][0]}
    assert cost.stored == most == measured[0][0], "the first rank has most"
    assert {whole for _, whole in measured} == {cost.whole_parameters}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_bytes_of_a_rank_are_those_of_its_tensors(world: int, kind: str) -> None:
    dtype, block_shape, moment_dtype = KINDS[kind]
    plan = planned(sparse_net(dtype, block_shape), world, moment_dtype)
    check(plan.per_rank.sparse, processes.run(world, after_a_step, kind))
    assert any("only tiles have moments" in each for each in plan.warnings) == (moment_dtype == "int8")


def test_bytes_of_a_rank_in_dense_training() -> None:
    cost = planned(sparse_net(BF16), 3).per_rank.dense
    none = dict.fromkeys(("bits", "lists", "own rows", "values", "scales"), 0)
    check(cost, processes.run(3, after_a_step, None))
    assert cost.stored == cost.stored | none and cost.topology == 0


def test_a_plan_warns_where_topologies_outweigh_what_sparsity_saves() -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    for block_shape, ranks, warns in ((1, 16, False), (1, 64, True), (16, 64, False)):
        plan = smet.plan(
            model, 0.25, block_shape=block_shape, compiled=False, inputs=lambda b, s: torch.zeros(b, 512),
            loss_fn=lambda model, x: model(x).sum(), mesh={"dp": ranks},
        )  # fmt: skip
        assert any("take larger blocks or fewer ranks" in each for each in plan.warnings) == warns


def test_copies_of_shards_change_nothing_that_is_stored() -> None:
    model = sparse_net(FP32)
    one, two = (
        smet.plan(model, compiled=False, inputs=lambda b, s: torch.zeros(b, 5, dtype=torch.int64), mesh=mesh,
                  loss_fn=lambda model, tokens: model(tokens).square().mean()).per_rank.sparse
        for mesh in ({"dp": 2}, {"dp": 2, "replicate": 2})
    )  # fmt: skip
    assert one.stored == two.stored
    shard_bytes = one.stored["gradients"]
    assert one.traffic.step["all-reduce"] == 0 and two.traffic.step["all-reduce"] == shard_bytes


def arriving(rank: int, world: int) -> int:
    """Returns the most bytes of the memory in which reduced gradients come, where each is used as it arrives."""
    model = shard(sparse_net(FP32))
    optimizer, most = smet.ActiveAdamW(model), [0]

    def look(parameter: Tensor) -> None:
        most[0] = max(most[0], local(parameter.grad).untyped_storage().nbytes())

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    updates = UpdatesOnArrival(optimizer)
    with updates.active():
        loss_of(model, 0, rank, world).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    return most[0]


def test_updates_in_backward_keep_the_gradients_of_one_group() -> None:
    plan = planned(sparse_net(FP32), 3, compiled=True)
    assert processes.run(3, arriving) == [plan.per_rank.sparse.stored["gradients"]] * 3


class OneRow(nn.Module):
    """Has a weight of one tile, all of which the first of two ranks holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def one_row() -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(OneRow(), 0.25, block_shape=4)


def after_a_step_of_one_row(rank: int, world: int) -> dict[str, int]:
    model: Any = torch.distributed.fsdp.fully_shard(one_row())
    optimizer = smet.ActiveAdamW(model)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return stored(model, [optimizer])


def test_a_weight_of_one_row() -> None:
    plan = smet.plan(
        one_row(), compiled=False, inputs=lambda b, s: torch.zeros(b, 8), loss_fn=lambda model, x: model(x).sum(),
        mesh={"dp": 2},
    )  # fmt: skip
    first, second = processes.run(2, after_a_step_of_one_row)
    assert plan.per_rank is not None
    assert plan.per_rank.sparse.stored == {kind: max(first[kind], second[kind]) for kind in first}
    assert first["own rows"] == 0 < second["own rows"]
