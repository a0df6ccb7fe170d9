"""Processes that start later join a run, others end, and some die in the middle of a switch: no step is lost."""

import random
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smet_compile.distributed import World, ask
from tests.distributed.elastic import Elastic, Mortal, options, wait_for
from tests.distributed.test_world import BLUEPRINT, train_step

TOTAL = 30
PAIR, FOUR = ([0, 1], ("dp",)), ([[0, 1], [2, 3]], ("replicate", "dp"))
Hook = Callable[[World, int], None]


def lived(world: World, total: int, before: Hook | None = None) -> tuple[dict[int, float], list[Any]]:
    """Trains; returns losses by step, and what became of each switch."""
    losses = {}
    for step in world.steps(total):
        if before is not None:
            before(world, step)
        losses[step] = train_step(world, step)
    return losses, [(change.step, change.went_back, change.mesh.table) for change in world.changes]


def stayed(address: str, rank: int, total: int) -> dict[int, float]:
    return lived(World(BLUEPRINT, mesh=PAIR[0], names=PAIR[1]), total)[0]


def losses_of(total: int) -> dict[int, float]:
    with Elastic() as elastic:
        elastic.start(2, stayed, total)
        losses: dict[int, float] = elastic.result(0, seconds=3600)
        return losses


def grows_and_moves(address: str, rank: int) -> Any:
    """Asks for two processes more, and later for a layout without the first two, whose steps end then."""

    def before(world: World, step: int) -> None:
        if rank == 0 and step == 3:
            wait_for(world, 4)
            world.ask([[0, 1], [2, 3]], names=("dp", "tp"))
        if rank == 0 and step == 12:
            world.ask([2, 3], names=("dp",), stay=False)

    return lived(World(BLUEPRINT, mesh=PAIR[0], names=PAIR[1], options=options()), TOTAL, before)


def joins(address: str, rank: int) -> Any:
    return lived(World.join(BLUEPRINT, address, options()), TOTAL)


def test_processes_join_later_and_the_first_ones_end() -> None:
    wanted = losses_of(TOTAL)
    with Elastic() as elastic:
        elastic.start(2, grows_and_moves)
        for _ in range(2):
            elastic.join(joins)
        found = [elastic.result(number) for number in range(4)]
    (first, changes), (second, _), (third, _), (fourth, _) = found
    (joined, *_), (left, *_) = changes
    assert all(each == changes for _, each in found[2:])
    assert sorted(first) == sorted(second) == list(range(left)) and joined < left < TOTAL
    assert sorted(third) == sorted(fourth) == list(range(joined, TOTAL))
    for losses, _ in found:
        torch.testing.assert_close(losses, {step: wanted[step] for step in losses}, rtol=0, atol=1e-12)


def listens(address: str, rank: int) -> Any:
    """Waits for a wish from outside, and for one by a signal."""
    world = World(BLUEPRINT, mesh=PAIR[0], names=PAIR[1], options=options())
    signal.signal(signal.SIGUSR1, lambda *_: world.ask([1, 2], names=("dp",), stay=False))
    made = 0
    for step in world.steps(100_000):
        train_step(world, step)
        made += 1
        if world.mesh is not None and world.mesh.members == [1, 2]:
            break
    return made, [change.mesh.table for change in world.changes]


def test_a_program_asks_from_outside_and_a_signal_from_inside() -> None:
    with Elastic() as elastic:
        elastic.start(3, listens)
        answer = eventually(lambda: ask(elastic.address, [0, 1, 2], names=("dp",)))
        assert re.match(r"switched after \d+ steps, in \d", answer)
        assert "expected ranks from 0 to 2, got [5]" in ask(elastic.address, [0, 5], names=("dp",))
        elastic.signal(1, signal.SIGUSR1)
        (first, tables), (second, _), (third, _) = (elastic.result(number) for number in range(3))
    assert tables == [[0, 1, 2], [1, 2]] and second > first > 0 and third > 0


def eventually(function: Callable[[], str]) -> str:
    """Returns what a function returns once there is a world."""
    while True:
        try:
            return function()
        except ValueError as error:
            assert "a store without one" in str(error)
            time.sleep(0.1)


def test_a_world_that_nobody_began_is_not_joined() -> None:
    with (
        Elastic() as elastic,
        pytest.raises(ValueError, match=r"expected a World at 127.0.0.1:.*, got a store without"),
    ):
        World.join(BLUEPRINT, elastic.address, options())
    with pytest.raises(ValueError, match=r"address: expected host:port.* got 'nowhere'"):
        World.join(BLUEPRINT, "nowhere", options())


def trains_on(address: str, rank: int, num_rounds: int) -> Any:
    """Asks for each pair of processes that joins, and then, if they are there, for a layout without them."""
    state = {"round": 0, "wish": 0}

    def before(world: World, step: int) -> None:
        stop = world._talk.decide("stop", -1) if world._talk.decided("stop") else None
        if stop is not None and step >= stop:
            raise Enough
        if rank or stop is not None or (state["wish"] and not world._talk.decided(f"answer {state['wish']}")):
            return
        assert world.mesh is not None
        if world.mesh.members != PAIR[0]:
            state["wish"] = world.ask(PAIR[0], names=PAIR[1])
        elif state["round"] == num_rounds:
            world._talk.decide("stop", step + 3)
        elif world.num_processes >= 4 + 2 * state["round"]:
            new = 2 + 2 * state["round"]
            state["wish"] = world.ask([[0, 1], [new, new + 1]], names=("replicate", "dp"))
            state["round"] += 1

    losses: dict[int, float] = {}
    world = World(BLUEPRINT, mesh=PAIR[0], names=PAIR[1], options=options())
    for step in world.steps(100_000):
        try:
            before(world, step)
        except Enough:
            break
        losses[step] = train_step(world, step)
        time.sleep(0.1)  # fewer steps while others die
    return losses, [(change.went_back, change.mesh.table) for change in world.changes]


class Enough(Exception):
    """Ends the run."""


def dies(address: str, rank: int, seed: int) -> Any:
    """Joins, and dies at a random moment of the switch that has it train, or of the one that has it leave.

    One of three dies in neither, and waits.
    """
    world = World.join(BLUEPRINT, address, options())
    Mortal(seed, most_seconds=0.2).arm()
    return lived(world, 100_000)


def go_through(num_rounds: int, seed: int) -> tuple[int, dict[int, float], list[Any]]:
    """Returns how many processes died, the losses, and what became of each switch."""
    draw, num_killed = random.Random(seed), 0
    with Elastic() as elastic:
        elastic.start(2, trains_on, num_rounds)
        for _ in range(num_rounds):
            number = elastic.join(dies, draw.randrange(10**6)) - 1
            elastic.join(dies, draw.randrange(10**6))
            elastic.wait_until_some_died(number, number + 1)
            time.sleep(draw.random())
            num_killed += elastic.kill(number) + elastic.kill(number + 1)
        losses, changes = elastic.result(0)
        assert elastic.result(1) == (losses, changes)
    return num_killed, losses, changes


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("num_rounds", "seed"), [(3, 2), pytest.param(100, 1, marks=pytest.mark.slow)])
def test_processes_die_in_the_middle_of_switches(num_rounds: int, seed: int) -> None:
    num_killed, losses, changes = go_through(num_rounds, seed)
    assert num_killed == 2 * num_rounds
    assert len(changes) >= num_rounds and any(went_back for went_back, _ in changes)
    assert all(mesh == PAIR[0] for went_back, mesh in changes if went_back)
    wanted = losses_of(len(losses))
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-12)
