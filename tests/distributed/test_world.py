"""A world follows wishes at a step that all ranks agree on; ranks that wait join, and ranks of the run leave it."""

from typing import Any

import pytest
import torch
from torch import distributed

from smet_compile.distributed import World
from tests.distributed.test_switch import builder, optimizing
from tests.shards.setting import loss_of
from tests.support.ranks import processes

TOTAL = 16


def build(mesh: Any) -> Any:
    kind = "tp" if "tp" in mesh.mesh_dim_names else "fsdp"
    return builder(kind, torch.float64, 4)(mesh)


def lived(rank: int, world: int, wishes: dict[int, tuple[Any, tuple[str, ...]]]) -> tuple[dict[int, float], list[int]]:
    """Trains with wishes that rank 1 has after some steps; returns its losses by step, and its steps."""
    here = World(build, optimizing({}), mesh=[0, 1], names=("dp",))
    losses, made = {}, []
    for step in here.steps(TOTAL):
        run = here.run
        assert run is not None
        number = (
            here.mesh.get_local_rank("dp")
            if "tp" in here.mesh.mesh_dim_names
            else here.mesh.mesh.flatten().tolist().index(rank)
        )
        of = here.mesh.size(0) if "tp" in here.mesh.mesh_dim_names else here.mesh.size()
        loss = loss_of(run.model, step, number, of)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.manager.step()
        total = loss.detach().clone()
        for dim in here.mesh.mesh_dim_names:
            distributed.all_reduce(total, group=here.mesh.get_group(dim))
        losses[step] = float(total / here.mesh.size())
        made.append(step)
        if rank == 1 and step in wishes:
            here.ask(wishes[step][0], names=wishes[step][1])
    return losses, made


def test_ranks_join_and_leave_without_a_step_lost() -> None:
    processes.stop()
    (stayed, _), *_ = processes.run(2, lived, {})
    processes.stop()
    wishes = {2: ([[0, 1], [2, 3]], ("dp", "tp")), 8: ([1, 2, 3], ("dp",))}
    found = processes.run(4, lived, wishes)
    processes.stop()
    first, second, third, fourth = (made for _, made in found)
    joined, left = third[0], first[-1] + 1
    assert joined in (4, 5, 6) and left in (10, 11, 12)  # two steps after the first rank sees the wish
    assert first == list(range(left)) and second == list(range(TOTAL))
    assert third == fourth == list(range(joined, TOTAL))
    for losses, _ in found:
        torch.testing.assert_close(losses, {step: stayed[step] for step in losses}, rtol=0, atol=1e-12)


def test_a_late_wish_is_left_and_all_ranks_end() -> None:
    processes.stop()
    late = {TOTAL - 1: ([[0, 1], [2, 3]], ("dp", "tp"))}
    found = processes.run(4, lived, late)
    processes.stop()
    assert [made for _, made in found] == [list(range(TOTAL))] * 2 + [[]] * 2


def refusals(rank: int, world: int) -> list[str]:
    found = []
    for ranks, names in (
        ([0, 0], ("dp",)),
        ([0, 2], ("dp",)),
        ([1, 0], ("dp",)),
        ([0, 1], ("dp", "tp")),
        ("all", ("dp",)),
    ):
        try:
            World(build, optimizing({}), mesh=ranks, names=names)
        except ValueError as error:
            found.append(str(error))
    return found


def test_meshes_that_cannot_be_are_refused() -> None:
    for twice, missing, descending, names, text in processes.run(2, refusals):
        assert twice == missing.replace("[0, 2]", "[0, 0]") and "expected ranks from 0 to 1, each once" in twice
        assert "ranks that ascend" in descending
        assert "a name for each dimension" in names and "a name for each dimension" in text


def test_a_process_alone_is_told_so() -> None:
    with pytest.raises(ValueError, match="World: expected a process group, got none"):
        World(build, optimizing({}), mesh=[0], names=("dp",))
