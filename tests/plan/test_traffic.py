"""Planned traffic of a rank is what its collectives send."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from inspect import signature
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import smet_compile as smet
from smet_compile.plan.traffic import DROP_FRACTION, rows_sent
from tests.plan.test_mesh import KINDS, optimizers_of, planned
from tests.shards.setting import loss_of, shard, sparse_net
from tests.support.ranks import processes

EVERY, WEIGHTS = 2, 4
"""Steps between updates, and compact weights, of each of which a count may be rounded."""
IS_RENAMED = hasattr(distributed, "all_gather_single")
GATHER = "all_gather_single" if IS_RENAMED else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if IS_RENAMED else "reduce_scatter_tensor"
"""The collectives by which FSDP2 gathers parameters and reduces gradients."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the bytes that this rank sends, by collective, as rings send them."""
    sent: Counter[str] = Counter()

    def counting(name: str, size: Callable[..., Any]) -> Any:
        real = getattr(distributed, name)

        def call(*args: Any, **options: Any) -> Any:
            sent[name] += size(distributed.get_world_size(options.get("group")), *args, **options)
            return real(*args, **options)

        return patch.object(distributed, name, call)

    def of_rows(world: int, arrived: Any, rows: Any, received: Any, sent_rows: Any, group: Any) -> int:
        others = sum(n for other, n in enumerate(sent_rows) if other != distributed.get_rank(group))
        return others * rows.shape[1]

    with (
        counting(GATHER, lambda world, whole, here, **_: (world - 1) * here.nbytes),
        counting(SCATTER, lambda world, output, input, **_: (world - 1) * output.nbytes),
        counting("all_gather", lambda world, parts, here, **_: (world - 1) * here.nbytes),
        counting("all_reduce", lambda world, tensor, *_, **__: Fraction(2 * (world - 1) * tensor.nbytes, world)),
        counting("all_to_all_single", of_rows),
    ):
        yield sent


def traffic(rank: int, world: int, kind: str, replicas: int, grow: str) -> list[Counter[str]]:
    """Returns what is sent in a step, in that before a topology update, and in the update."""
    dtype, block_shape, moment_dtype = KINDS[kind]
    shape, names = ((world,), ("shard",)) if replicas == 1 else ((replicas, world // replicas), ("replicate", "shard"))
    model = shard(sparse_net(dtype, block_shape), mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizers = optimizers_of(model, moment_dtype)
    manager = smet.TopologyManager(
        model, optimizers, total_steps=20, every=EVERY, schedule="constant", drop_fraction=DROP_FRACTION, grow=grow,
        min_age=0, auto_step=False,
    )  # fmt: skip
    found: list[Counter[str]] = []
    for step in range(2 * EVERY):
        with counted() as sent:
            loss_of(model, step, rank, world).backward()
        found.append(sent)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with counted() as of_update:
            manager.step()
    assert len(manager.history) == 2
    return [*found[-2:], of_update]


@pytest.mark.parametrize("kind", ["single weights, fp32", "tiles, 8 bits"])
@pytest.mark.parametrize("world", [2, 3])
def test_traffic_of_a_rank(world: int, kind: str) -> None:
    dtype, block_shape, moment_dtype = KINDS[kind]
    expected = planned(sparse_net(dtype, block_shape), world, moment_dtype).per_rank.sparse.traffic
    of_update = expected.update
    moved = 0
    for step, before, update in processes.run(world, traffic, kind, 1, "gradient"):
        assert step[GATHER] == before[GATHER] == expected.step["all-gather"]
        assert step[SCATTER] == expected.step["reduce-scatter"]
        assert step["all_reduce"] == expected.step["all-reduce"] == 0
        assert 0 <= before["all_reduce"] - expected.growth < WEIGHTS
        assert update["all_gather"] == of_update["scores"] + of_update["ages"]
        assert 0 <= update["all_reduce"] - of_update["scales"] - of_update["digests"] < WEIGHTS
        moved += update["all_to_all_single"]
    assert 0 < moved < 3 * world * of_update["rows"]
    assert (of_update["scales"] > 0) == (moment_dtype == "int8")


def test_traffic_of_replicas() -> None:
    model = sparse_net(torch.float32)
    plan = smet.plan(
        model,
        compiled=False,
        inputs=lambda batch, sequence: torch.zeros(batch, 5, dtype=torch.int64),
        loss_fn=lambda model, tokens: model(tokens).square().mean(),
        mesh={"dp": 2, "replicate": 2},
    )
    assert plan.per_rank is not None
    expected = plan.per_rank.sparse.traffic
    for step, before, update in processes.run(4, traffic, "single weights, fp32", 2, "gradient"):
        assert step[GATHER] == expected.step["all-gather"]
        assert step[SCATTER] == expected.step["reduce-scatter"]
        assert step["all_reduce"] == expected.step["all-reduce"] > 0
        assert before["all_reduce"] - step["all_reduce"] == expected.growth
        assert update["all_gather"] == expected.update["scores"] + expected.update["ages"]
        assert update["all_reduce"] == expected.update["digests"]


@pytest.mark.parametrize(("num_blocks", "density", "num_ranks"), [(10_000, 0.3, 3), (8_000, 0.25, 2), (20_000, 0.1, 6)])
def test_the_estimate_of_rows_is_the_mean_of_many_updates(num_blocks: int, density: float, num_ranks: int) -> None:
    """Its error is that of 300 draws, and rounding of rows, which are few here."""
    generator = torch.Generator().manual_seed(0)
    num_rows = int(density * num_blocks)
    num_moved, chunk, total = int(DROP_FRACTION * num_rows), -(-num_rows // num_ranks), torch.zeros(num_ranks)
    for _ in range(300):
        order = torch.randperm(num_blocks, generator=generator)
        active, inactive = order[:num_rows], order[num_rows:]
        before, kept = torch.zeros(2, num_blocks, dtype=torch.bool)
        before[active], kept[active[num_moved:]] = True, True
        after = kept.clone()
        after[inactive[:num_moved]] = True
        old, new = ((mask.cumsum(0)[kept] - 1) // chunk for mask in (before, after))
        total += torch.bincount(old[old != new], minlength=num_ranks)
    middle = slice((num_ranks - 1) // 2, num_ranks // 2 + 1)
    assert float(total[middle].mean() / 300) == pytest.approx(rows_sent(num_rows, num_ranks), rel=0.1)


def test_few_rows_on_many_ranks_all_move() -> None:
    assert rows_sent(1000, 1) == 0
    assert rows_sent(1000, 1000) == pytest.approx(1 - DROP_FRACTION)


def test_the_share_that_is_dropped_is_that_of_the_manager() -> None:
    assert signature(smet.TopologyManager).parameters["drop_fraction"].default == DROP_FRACTION


def test_a_compact_layer_takes_its_density_of_the_traffic_of_a_dense_one() -> None:
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64, bias=False))

    plan = smet.plan(
        layer(), 0.25, block_shape=8, inputs=lambda b, s: torch.zeros(b, 64), loss_fn=lambda m, x: m(x).sum(),
        compiled=False, mesh={"dp": 4},
    )  # fmt: skip
    assert plan.per_rank is not None
    sparse, dense = plan.per_rank.sparse.traffic.step, plan.per_rank.dense.traffic.step
    assert dense == {"all-gather": 3 * 1024 * 4, "reduce-scatter": 3 * 1024 * 4, "all-reduce": 0, "tensor parallel": 0}
    assert {kind: 4 * count for kind, count in sparse.items()} == dense
