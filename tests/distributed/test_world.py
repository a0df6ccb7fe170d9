"""A world follows wishes at a step that all ranks agree on; ranks that wait join, and ranks of the run leave it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from smet_compile.distributed import Blueprint, World, WorldOptions
from tests.distributed.test_switch import builder, optimizing
from tests.shards.setting import loss_of
from tests.support.ranks import processes

TOTAL = 24


def build(mesh: Any) -> Any:
    kind = "tp" if "tp" in mesh.mesh_dim_names else "fsdp"
    return builder(kind, torch.float64, 4)(mesh)


BLUEPRINT = Blueprint(build, optimizing({}))


def train_step(world: World, step: int) -> float:
    """Makes a step; returns the mean loss over the ranks that train."""
    loss = loss_of(world.model, step, world.data_rank, world.num_data_ranks)
    loss.backward()
    world.optimizer.step()
    world.optimizer.zero_grad()
    world.manager.step()
    total, mesh = loss.detach().clone(), world.run.mesh
    for dim in mesh.mesh_dim_names:
        distributed.all_reduce(total, group=mesh.get_group(dim))
    return float(total / mesh.size())


def lived(
    rank: int, world: int, wishes: dict[int, tuple[Any, tuple[str, ...]]], options: WorldOptions, prepare: bool
) -> tuple[dict[int, float], list[int], list[float]]:
    """Trains with wishes that rank 1 has after some steps; returns its losses by step, the switches and pauses."""
    here = World(BLUEPRINT, mesh=[0, 1], names=("dp",), options=options)
    losses = {}
    for step in here.steps(TOTAL):
        losses[step] = train_step(here, step)
        if prepare:
            time.sleep(0.05)
        if rank == 1 and step in wishes:
            here.ask(wishes[step][0], names=wishes[step][1], prepare=prepare)
    assert not any(change.went_back for change in here.changes)
    return losses, [change.step for change in here.changes], [change.pause for change in here.changes]


@pytest.mark.parametrize(("prepare", "keep_source"), [(False, True), (True, False)])
def test_ranks_join_and_leave_without_a_step_lost(prepare: bool, keep_source: bool) -> None:
    processes.stop()
    options = WorldOptions(keep_source=keep_source)
    (stayed, _, _), *_ = processes.run(2, lived, {}, options, False)
    processes.stop()
    wishes = {2: ([[0, 1], [2, 3]], ("dp", "tp")), 8: ([1, 2, 3], ("dp",))}
    found = processes.run(4, lived, wishes, options, prepare)
    processes.stop()
    first, second, third, fourth = (sorted(losses) for losses, _, _ in found)
    (joined, left), *others = (switches for _, switches, _ in found)
    assert others == [[joined, left]] * 3 and 4 <= joined <= left < TOTAL and left >= 10
    assert first == list(range(left)) and second == list(range(TOTAL))
    assert third == fourth == list(range(joined, TOTAL))
    for losses, _, _ in found:
        torch.testing.assert_close(losses, {step: stayed[step] for step in losses}, rtol=0, atol=1e-12)


def test_a_late_wish_is_left_and_all_ranks_end() -> None:
    processes.stop()
    late = {TOTAL - 1: ([[0, 1], [2, 3]], ("dp", "tp"))}
    found = processes.run(4, lived, late, WorldOptions(), True)
    processes.stop()
    assert [sorted(losses) for losses, _, _ in found] == [list(range(TOTAL))] * 2 + [[]] * 2


def in_parts(mesh: Any) -> Any:
    if mesh.size() == 3:
        raise ValueError("build: expected two or four ranks, got three")
    return build(mesh)


def asks_much(rank: int, world: int, folder: str) -> Any:
    """Asks for a layout that cannot be built, for two at once, and by a file; returns what became of each."""
    file = Path(folder) / "wish.json"
    here = World(
        Blueprint(in_parts, optimizing({})), mesh=[0, 1], names=("dp",), options=WorldOptions(wish_file=str(file))
    )
    losses, wishes = {}, []
    for step in here.steps(200):
        losses[step] = train_step(here, step)
        if rank == 0 and step == 2:
            meshes = (([0, 1, 2], ("dp",)), ([0, 1, 7], ("dp",)), ([[0, 1], [2, 3]], ("dp", "tp")), ([0, 2], ("dp",)))
            wishes = [here.ask(mesh, names=names) for mesh, names in meshes]
        if rank == 0 and len(here.changes) == 2 and not file.exists() and here.mesh.members == [0, 2]:
            file.write_text('{"mesh": [0, 0], "names": ["dp"]}' if step % 2 else '{"mesh": [1, 2], "names": ["dp"]}')
        if len(here.changes) == 3:
            break
    answers = [here.answer(number) for number in wishes]
    return losses, answers, [change.mesh.table for change in here.changes]


def test_wishes_are_refused_or_fulfilled_in_their_order(tmp_path: Path) -> None:
    processes.stop()
    (_, answers, tables), *others = processes.run(4, asks_much, str(tmp_path))
    processes.stop()
    built, unknown, first, second = answers
    assert built == "refused: ValueError: build: expected two or four ranks, got three"
    assert unknown.startswith("refused: mesh: expected ranks from 0 to 3, got [7]")
    assert first.startswith("switched after") and second.startswith("switched after")
    assert tables == [[[0, 1], [2, 3]], [0, 2], [1, 2]] and not (tmp_path / "wish.json").exists()
    assert all(seen == tables for _, _, seen in others)


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
            World(BLUEPRINT, mesh=ranks, names=names)
        except ValueError as error:
            found.append(str(error))
    return found


def test_meshes_that_cannot_be_are_refused() -> None:
    for twice, missing, descending, names, text in processes.run(2, refusals):
        assert "expected ranks from 0, each once, got [0, 0]" in twice
        assert "expected ranks from 0 to 1, each once, got [0, 2]" in missing
        assert "ranks that ascend" in descending
        assert "a name for each dimension" in names and "a name for each dimension" in text


def test_a_process_alone_is_told_so() -> None:
    with pytest.raises(ValueError, match="World: expected a process group, got none"):
        World(BLUEPRINT, mesh=[0], names=("dp",))
