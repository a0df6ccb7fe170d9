"""A run with dropout goes on in another layout with its random states; schedulers and places in the data go along."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import smet_compile as smet
from smet_compile.distributed import Blueprint, Run, data_rank, switch
from tests.distributed.test_switch import Layout, blueprint, from_first_of, mean_over, mesh_of, optimizing, reader_of
from tests.shards.setting import ROWS
from tests.support.ranks import processes

TWO_SHARES: list[Layout] = [
    ("fsdp", [0, 1]),
    ("tp", [[0, 1], [2, 3]]),
    ("ddp", [1, 3]),
    ("hsdp", [[0], [2]]),
    ("fsdp", [2, 3]),
]
OTHER_SHARES: list[Layout] = [("fsdp", [0, 1]), ("fsdp", [0, 1, 2, 3]), ("fsdp", [0, 2])]
STEPS = 4


class Cursor:
    """Counts the batches that were read, and draws which comes next."""

    def __init__(self) -> None:
        self.count = 0

    def next(self) -> int:
        self.count += 1
        return self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def with_cursor(model: nn.Module) -> Any:
    optimizer, manager = optimizing({})(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return optimizer, manager, {"scheduler": scheduler, "cursor": Cursor()}


def loss_of(run: Run, number: int, count: int) -> Tensor:
    """Returns a loss whose inputs go through dropout, with rows that depend on the cursor."""
    step = run.others["cursor"].next()
    tokens = torch.randint(17, (ROWS, 6), generator=torch.Generator().manual_seed(step))
    mine = tokens[ROWS // count * number : ROWS // count * (number + 1)]
    logits = nn.functional.dropout(run.forward(mine), 0.3)
    return nn.functional.cross_entropy(logits.flatten(0, 1), mine.flatten())


def lived(rank: int, world: int, layouts: list[Layout]) -> tuple[list[float], list[Any]]:
    """Trains some steps in each layout; returns the losses, and what each layout began with."""
    mesh, began, losses = mesh_of(layouts[0]), [], []
    torch.manual_seed(rank)
    random.seed(rank)
    run = None
    for number, layout in enumerate(layouts):
        plan = blueprint(layout[0], torch.float64, 1, {})
        plan = Blueprint(plan.build, with_cursor, plan.wrap)
        mesh = mesh_of(layout)
        run = switch(run, plan.prepare(mesh)).run if number else plan.begin(mesh)
        found = []
        if run is not None:
            assert data_rank(mesh, rank) == reader_of(layout)
            rates = [group["lr"] for group in run.optimizer.param_groups]
            began.append((run.others["cursor"].count, rates[0], random.random()))
            for _ in range(STEPS):
                loss = loss_of(run, *reader_of(layout))
                loss.backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
                run.manager.step()
                run.others["scheduler"].step()
                found.append(loss.detach())
        losses += mean_over(mesh, found, STEPS)
    return losses, from_first_of(mesh, began)


def test_with_as_many_shares_dropout_draws_what_it_would_have() -> None:
    processes.stop()
    stayed = [TWO_SHARES[0]] * len(TWO_SHARES)
    wanted, _ = processes.run(2, lived, stayed)[0]
    processes.stop()
    moved, _ = processes.run(4, lived, TWO_SHARES)[0]
    processes.stop()
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-12)


def test_with_other_shares_the_first_goes_on_and_new_ones_differ() -> None:
    processes.stop()
    found = [states for _, states in processes.run(4, lived, OTHER_SHARES)]
    processes.stop()
    assert [count for count, _, _ in found[0]] == [0, STEPS, 2 * STEPS]
    assert [rate for _, rate, _ in found[0]] == pytest.approx([3e-3, 3e-3 / (1 + STEPS), 3e-3 / (1 + 2 * STEPS)])


def streams_of_new_shares(rank: int, world: int) -> tuple[float, float]:
    """Goes from two ranks to four; returns the next numbers that torch and Python draw."""
    torch.manual_seed(7)
    random.seed(7)
    plan = blueprint("fsdp", torch.float64, 1, {})
    run = plan.begin(mesh_of(("fsdp", [0, 1])))
    assert switch(run, plan.prepare(mesh_of(("fsdp", [0, 1, 2, 3])))).run is not None
    return float(torch.rand(())), random.random()


def test_new_shares_have_streams_of_their_own() -> None:
    processes.stop()
    found = processes.run(4, streams_of_new_shares)
    processes.stop()
    assert found[0] == found[1]  # both were seeded alike
    assert len({each for pair in found[1:] for each in pair}) == 6


def test_an_object_without_a_state_is_named() -> None:
    optimize = Blueprint(lambda mesh: nn.Linear(2, 2), lambda model: (None, None, {"cursor": 3}))
    with pytest.raises(
        ValueError, match="optimize: expected an object with state_dict and load_state_dict for 'cursor'"
    ):
        smet.distributed.Prepared(optimize, None, None, None).finish(nn.Linear(2, 2))


def shares(mesh: DeviceMesh) -> Any:
    return [data_rank(mesh, rank) for rank in mesh.mesh.flatten().tolist()]


def numbers(rank: int, world: int) -> Any:
    return shares(mesh_of(("tp", [[0, 1], [2, 3]]))), shares(mesh_of(("hsdp", [[0, 1], [2, 3]])))


def test_ranks_of_tensor_parallelism_read_the_same() -> None:
    with_tp, without = processes.run(4, numbers)[0]
    assert with_tp == [(0, 2), (0, 2), (1, 2), (1, 2)] and without == [(0, 4), (1, 4), (2, 4), (3, 4)]
