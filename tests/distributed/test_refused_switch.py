"""A switch that is refused leaves the run as it was, on every rank, whatever was sent and freed before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

import smet_compile as smet
from smet_compile.distributed import Blueprint, LostRun, Run, SwitchOptions, World, WorldOptions, switch
from smet_compile.distributed.transfer import WAYS
from tests.distributed.elastic import Elastic, wait_for
from tests.distributed.test_switch import builder, in_ddp, mesh_of, optimizing, whole_state
from tests.distributed.test_world import BLUEPRINT, build, train_step
from tests.shards.setting import loss_of
from tests.support.ranks import processes

ALIKE = optimizing({})
OLD, NEW = ("fsdp", [0, 1, 2]), ("tp", [[0, 1], [2, 3]])


class Place:
    """Holds a place in the data, which every run here goes on from."""

    def __init__(self) -> None:
        self.at, self.fails = 0, False

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]
        if self.fails:
            raise KeyError("place")


PLACE = Place()


def with_place(model: nn.Module) -> Any:
    return *ALIKE(model), {"place": PLACE}


def with_other_steps(model: nn.Module) -> Any:
    optimizer = smet.ActiveAdamW(model, 3e-3, warmup_steps=5)
    return optimizer, smet.TopologyManager(model, optimizer, total_steps=60, every=7, schedule="cosine")


def in_two_groups(model: nn.Module) -> Any:
    groups = [{"params": list(model.head.parameters())}, {"params": list(model.layers.parameters())}]
    optimizer = smet.ActiveAdamW(groups, 3e-3, model=model, warmup_steps=5)
    return optimizer, smet.TopologyManager(model, optimizer, total_steps=60, every=4, schedule="cosine")


def without_manager(model: nn.Module) -> Any:
    return smet.ActiveAdamW(model, 3e-3, warmup_steps=5), None


def failing_on_one(model: nn.Module) -> Any:
    made = with_place(model)
    torch.rand(3)
    if distributed.get_rank() == 3:
        raise RuntimeError("no memory")
    return made


def failing_wrap(model: nn.Module, mesh: DeviceMesh) -> Any:
    wrapped = in_ddp(model, mesh)  # the others wait for this one there
    if distributed.get_rank() == 1:
        raise RuntimeError("no wrapper")
    return wrapped


def has_trained(run: Run | None, first: int, last: int) -> list[float]:
    """Makes steps on the ranks that take part; returns their losses."""
    losses = []
    for step in range(first, last) if run is not None else ():
        loss = loss_of(run.forward, step, distributed.get_rank(), 3)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.manager.step()
        losses.append(loss.item())
    return losses


def refused(rank: int, world: int, way: Any) -> Any:
    """Asks for switches that fail when the state has been sent; returns the errors, and what has changed."""
    PLACE.at, PLACE.fails = 3 + rank, False
    plan = Blueprint(builder("fsdp", torch.float32, 4), with_place)
    moved, stayed = (plan.begin(mesh_of(OLD)) for _ in range(2))
    has_trained(moved, 0, 9)
    has_trained(stayed, 0, 9)
    before, random = whole_state(moved), torch.get_rng_state()
    parallel = builder("tp", torch.float32, 4)
    plans = [Blueprint(parallel, each) for each in (with_other_steps, in_two_groups, without_manager, failing_on_one)]
    layouts = [(each, NEW) for each in plans]
    layouts += [(Blueprint(builder("ddp", torch.float32, 4), with_place, failing_wrap), ("ddp", [1, 2, 3]))]
    layouts += [(Blueprint(parallel, with_place), NEW)]
    errors, wrong = [], []
    for other, layout in layouts:
        PLACE.fails = rank == 2 and layout == NEW and other is layouts[-1][0]
        try:
            switch(moved, other.prepare(mesh_of(layout)), SwitchOptions(chunk_bytes=4096, way=way))
        except ValueError as error:
            errors.append(str(error))
        after = whole_state(moved)
        wrong += [key for key in before if not torch.equal(before[key], after[key])]
        if moved is not None and not torch.equal(random, torch.get_rng_state()):
            wrong.append("random state")
        if moved is not None and PLACE.at != 3 + rank:
            wrong.append(f"place {PLACE.at}")
    return errors, wrong, has_trained(moved, 9, 15) == has_trained(stayed, 9, 15)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_as_it_was_where_the_new_one_cannot_be_made(way: str) -> None:
    processes.stop()
    for (steps, groups, manager, memory, wrapper, place), wrong, goes_on in processes.run(4, refused, way):
        assert steps.startswith("every: expected 7 as in this manager, got 4") and "the run is as it was" in steps
        assert (
            "expected the parameter groups of the run, got others (2, 12 parameters instead of 15 parameters)" in groups
        )
        assert manager == "optimize: expected a manager as in the run, got None; make them alike; the run is as it was"
        assert memory == "switch: RuntimeError: no memory; the run is as it was"
        assert wrapper == "switch: RuntimeError: no wrapper; the run is as it was"
        assert place == "switch: KeyError: 'place'; the run is as it was"
        assert wrong == [] and goes_on
    processes.stop()


class Refusing:
    """Makes optimizer and manager; refuses where ``refuses`` says so."""

    def __init__(self, refuses: Callable[[nn.Module], bool]) -> None:
        self._refuses = refuses

    def __call__(self, model: nn.Module) -> Any:
        if self._refuses(model):
            raise ValueError("optimize: expected another layout")
        return ALIKE(model)


def is_parallel(model: nn.Module) -> bool:
    return any("tp" in (p.device_mesh.mesh_dim_names or ()) for p in model.parameters())


def asks_in_vain(rank: int, world: int, keep_source: bool) -> Any:
    """Asks twice for a layout that optimize refuses, and then for one that is possible."""
    plan = Blueprint(build, Refusing(is_parallel))
    here = World(plan, mesh=[0, 1], names=("dp",), options=WorldOptions(keep_source=keep_source))
    losses: dict[int, float] = {}
    wishes: list[int] = []
    for step in here.steps(200):
        losses[step] = train_step(here, step)
        if rank == 0 and step == 2:
            wishes.append(here.ask([[0, 1], [2, 3]], names=("dp", "tp")))
            wishes.append(here.ask([[0, 1], [2, 3]], names=("dp", "tp"), prepare=False))
            wishes.append(here.ask([1, 2], names=("dp",)))
        if len(here.changes) == 3:
            break
    answers = [here.answer(number) for number in wishes]
    return losses, answers, [(change.mesh.table, change.went_back, change.refusal) for change in here.changes]


@pytest.mark.parametrize("keep_source", [False, True])
def test_a_world_goes_on_where_it_is_refused_a_layout(keep_source: bool) -> None:
    processes.stop()
    (_, answers, changes), (second, _, _), *others = processes.run(4, asks_in_vain, keep_source)
    processes.stop()
    refused_first, refused_second, last = answers
    refusal = "optimize: expected another layout; the run is as it was"
    assert refused_first == refused_second == f"refused: {refusal}"
    assert last.startswith("switched after")
    assert changes == [([0, 1], True, refusal)] * 2 + [([1, 2], False, "")]
    assert all(each == changes for _, _, each in others)
    processes.stop()
    wanted, *_ = processes.run(2, stays, max(second) + 1)
    processes.stop()
    torch.testing.assert_close(second, wanted, rtol=0, atol=1e-12)


def stays(rank: int, world: int, total: int) -> dict[int, float]:
    here = World(BLUEPRINT, mesh=[0, 1], names=("dp",))
    return {step: train_step(here, step) for step in here.steps(total)}


def is_of_three(model: nn.Module) -> bool:
    return any(p.device_mesh.size() == 3 for p in model.parameters())


class Switches:
    """Refuses all runs once it is closed."""

    is_closed = False


def is_closed(model: nn.Module) -> bool:
    return Switches.is_closed or is_of_three(model)


def with_one_more(address: str, rank: int | None, closes: bool) -> Any:
    """Asks for a layout with a process that has just joined, where all form a new process group first."""
    plan, options = Blueprint(build, Refusing(is_closed)), WorldOptions(patience=3.0)
    if rank is None:
        world = World.join(plan, address, options)
    else:
        world = World(plan, mesh=[0, 1], names=("dp",), options=options)
    losses, wish = {}, 0
    try:
        for step in world.steps(20):
            if rank == 0 and step == 3:
                wait_for(world, 3)
                wish = world.ask([0, 1, 2], names=("dp",))
            Switches.is_closed = closes
            losses[step] = train_step(world, step)
    except LostRun as error:
        return str(error), losses
    return world.answer(wish) if rank == 0 else "", losses


def joins(address: str, rank: int, closes: bool) -> Any:
    return with_one_more(address, None, closes)


@pytest.mark.parametrize("closes", [False, True])
def test_a_run_is_made_anew_where_its_group_is_gone_or_says_why_not(closes: bool) -> None:
    with Elastic() as elastic:
        elastic.start(2, with_one_more, closes)
        elastic.join(joins, closes)
        (answer, losses), (second, _), (third, _) = (elastic.result(number) for number in range(3))
    if closes:
        for text in (answer, second, third):
            assert text.startswith("world: a switch failed (optimize: expected another layout; the run is as it was)")
            assert "cannot go on in the layout that is left (optimize: expected another" in text and "died" not in text
        return
    assert answer == "refused: optimize: expected another layout; the run is as it was"
    processes.stop()
    wanted, *_ = processes.run(2, stays, 20)
    processes.stop()
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-12)
