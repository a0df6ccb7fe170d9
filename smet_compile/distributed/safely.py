"""Switches a run between processes that may die meanwhile.

All processes say when they are done, and what the first of them decides counts. Where one fails, those that are left
form a new process group, if all of them still have their parts of the old state. They go on in the old layout if all of
its processes are among them, else in the new one if that is so of it and the parts that are left make the whole state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import distributed

from smet_compile.distributed.generation import Generation, MeshWish, leave
from smet_compile.distributed.members import LostRun, Members
from smet_compile.distributed.run import Blueprint, Prepared, Run
from smet_compile.distributed.switch import Switched, SwitchOptions, move
from smet_compile.distributed.taken import Taken


@dataclass(frozen=True)
class Outcome:
    """Holds the result of a switch: the run, the process group and the mesh that it has from now on."""

    switched: Switched
    generation: Generation
    mesh: MeshWish
    went_back: bool = False


@dataclass(frozen=True)
class Order:
    """Holds an order to switch.

    Args:
        number: of the order. members: the processes that take part. mesh: the new layout. is_fresh: whether they form a
            new process group first, with ``backend``.
        old_mesh: the layout so far. old_ranks: the members of the process group so far, by rank.
    """

    number: int
    members: list[int]
    mesh: MeshWish
    is_fresh: bool
    backend: str
    old_mesh: MeshWish
    old_ranks: list[int]

    @classmethod
    def of(cls, order: dict[str, Any]) -> Order:
        """Reads it as it came through the store."""
        old = MeshWish(order["old"]["mesh"], tuple(order["old"]["names"]))
        return cls(
            order["number"],
            order["members"],
            MeshWish.of(order),
            order["is_fresh"],
            order["backend"],
            old,
            order["old"]["ranks"],
        )


class SafeSwitch:
    """Carries out an order on one of its members.

    Args:
        generation: the process group so far; None on a process that has none.
    """

    def __init__(
        self, talk: Members, blueprint: Blueprint, options: SwitchOptions, generation: Generation | None, order: Order
    ) -> None:
        self._talk, self._blueprint, self._options = talk, blueprint, options
        self._generation, self._order = generation, order

    def run(self, run: Run | None, prepared: Prepared | None) -> Outcome:
        """Switches, or goes on without the processes that failed.

        Raises:
            LostRun: the processes that are left do not have the whole state.
        """
        try:
            taken = Taken.of(run, distributed.get_rank() if run is not None else -1)
        except Exception as error:
            raise LostRun(f"world: a process of the run failed before a switch: {error}") from error
        outcome = None
        try:
            outcome = self._try(taken, prepared)
            wrong = self._vote()
        except Exception as error:
            wrong = self._talk.decide(self._verdict, f"{type(error).__name__}: {error}")
        if not wrong and outcome is not None:
            return outcome
        return self._go_on_without(taken, wrong)

    @property
    def _verdict(self) -> str:
        return f"verdict {self._order.number}"

    def _try(self, taken: Taken, prepared: Prepared | None) -> Outcome:
        order, generation = self._order, self._generation
        if order.is_fresh:
            self._talk.meet("taken", order.number, order.old_mesh.members)  # nobody leaves while others still ask
            generation = Generation.enter(self._talk, order.number, "new", order.members, order.backend)
            taken = taken.renumbered(generation.numbers_from(order.old_ranks))
        else:
            self._talk.meet("come", order.number, order.members)
        assert generation is not None
        if prepared is None:
            prepared = self._blueprint.prepare(generation.mesh(order.mesh))
        return Outcome(move(taken, prepared, self._options), generation, order.mesh)

    def _vote(self) -> str:
        """Says that this process is done; returns why the switch does not count, "" where it does."""
        order = self._order
        self._talk.say("done", order.number)
        done = self._talk.wait_for("done", order.number, order.members, or_decided=self._verdict)
        missing = sorted(set(order.members) - set(done))
        verdict: str = self._talk.decide(self._verdict, f"nothing came from {missing}" if missing else "")
        return verdict

    def _go_on_without(self, taken: Taken, wrong: str) -> Outcome:
        order, talk = self._order, self._talk
        leave()
        talk.say("is left", order.number, not taken.released)
        left: list[int] = talk.decide(f"left {order.number}", talk.wait_for("is left", order.number, order.members))
        are_whole = all(talk.said("is left", order.number, member) for member in left)
        target = next((mesh for mesh in (order.old_mesh, order.mesh) if set(mesh.members) <= set(left)), None)
        if talk.number not in left or target is None or not are_whole:
            raise LostRun(
                f"world: a switch failed ({wrong}), and processes {left} do not have the whole run; start it again "
                f"from its last checkpoint{'' if are_whole else ', or set keep_source for the next time'}"
            )
        generation = Generation.enter(talk, order.number, "left", left, order.backend)
        prepared = self._blueprint.prepare(generation.mesh(target))
        taken = taken.renumbered(generation.numbers_from(order.old_ranks))
        try:
            switched = move(taken, prepared, replace(self._options, keep_source=True))
        except ValueError as error:
            raise LostRun(
                f"world: a switch failed ({wrong}), and a part of the run is gone with a process that died ({error}); "
                "start it again from its last checkpoint"
            ) from error
        return Outcome(switched, generation, target, went_back=target == order.old_mesh)
