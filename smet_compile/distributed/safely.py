"""Switches a run between processes that may die meanwhile.

All processes say when they are done, and what the first of them decides counts. Where one fails, those that are left
form a new process group, if all of them still have their parts of the old state. They go on in the old layout if all of
its processes are among them, else in the new one if that is so of it and the parts that are left make the whole state.
A switch that is refused has changed nothing: the run goes on as it is, or, where its process group is gone already, is
made anew in its old layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from smet_compile.distributed.generation import Generation, MeshWish, leave
from smet_compile.distributed.members import LostRun, Members
from smet_compile.distributed.run import Blueprint, Prepared, Run
from smet_compile.distributed.space import plan_switch
from smet_compile.distributed.switch import Switched, SwitchOptions, move
from smet_compile.distributed.taken import Taken
from smet_compile.distributed.transfer import Meter

_MOST_ATTEMPTS = 6


@dataclass(frozen=True)
class Outcome:
    """Holds the result of a switch: the run, the process group and the mesh that it has from now on.

    Args:
        generation: None on a process that still has no process group.
        went_back: whether the mesh is the old one.
        refusal: says why the run could not move, where no process failed; else empty.
    """

    switched: Switched
    generation: Generation | None
    mesh: MeshWish
    went_back: bool = False
    refusal: str = ""


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
        old, mesh = order["old"], MeshWish.of(order)
        about = order["is_fresh"], order["backend"]
        return cls(order["number"], order["members"], mesh, *about, MeshWish.of(old), old["ranks"])


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
        self._refusal = self._first_wrong = ""

    def run(self, run: Run | None, prepared: Prepared | None) -> Outcome:
        """Switches, or goes on without the processes that failed.

        Raises:
            LostRun: the processes that are left do not have the whole state, or cannot make the run anew.
        """
        try:
            taken = Taken.of(run)
        except Exception as error:
            raise LostRun(f"world: a process of the run failed before a switch: {error}") from error
        refusal = self._reason_to_stay(run, taken)
        if refusal:
            return self._unmoved(run, refusal)
        outcome, wrong = self._attempt(0, self._order.members, lambda: self._as_ordered(taken, prepared))
        if outcome is None and self._are_refused_alike():
            return self._unmoved(run, self._refusal)
        self._first_wrong = wrong
        for number in range(1, _MOST_ATTEMPTS):
            if outcome is not None:
                return outcome
            leave()
            left, mesh = self._left(number, taken, wrong)
            outcome, wrong = self._attempt(number, left, functools.partial(self._anew, left, mesh, taken))
        raise LostRun(f"world: a switch failed ({wrong}), and so did every try to go on without those that died")

    def _reason_to_stay(self, run: Run | None, taken: Taken) -> str:
        """Returns why the run cannot move, on all members: what its processes say, which agree."""
        key, talk, old = self._order.number, self._talk, self._order.old_mesh.members
        if run is not None:
            talk.say("stays", key, taken.refusal)
            return taken.refusal
        found = talk.wait_for("stays", key, old[:1])
        return str(talk.said("stays", key, old[0])) if found else ""

    def _unmoved(self, run: Run | None, refusal: str) -> Outcome:
        switched = Switched(run, plan_switch([]), Meter())
        return Outcome(switched, self._generation, self._order.old_mesh, went_back=True, refusal=refusal)

    def _are_refused_alike(self) -> bool:
        """Tells whether all members were refused in their old process group; all of them hear the same.

        Where the first try failed on some, or they have left that group, they have to form another one.
        """
        key, talk, members = self._key, self._talk, self._order.members
        is_decided = f"refused {key} alike"
        if self._order.is_fresh or not self._refusal:
            return bool(talk.decide(is_decided, False))
        talk.say("refused", key)
        return bool(talk.decide(is_decided, talk.wait_for("refused", key, members, is_decided) == members))

    def _attempt(self, number: int, members: list[int], switch: Callable[[], Outcome]) -> tuple[Outcome | None, str]:
        """Returns what a try came to: an outcome that all members have, or None and why not."""
        self._key = f"{self._order.number}.{number}"
        verdict = f"verdict {self._key}"
        try:
            outcome = switch()
            self._talk.say("done", self._key)
            done = self._talk.wait_for("done", self._key, members, or_decided=verdict)
            missing = sorted(set(members) - set(done))
            wrong: str = self._talk.decide(verdict, f"nothing came from {missing}" if missing else "")
        except ValueError as error:  # all of them raise it
            if number:
                raise LostRun(
                    f"world: a switch failed ({self._first_wrong}), and the run cannot go on in the layout that is "
                    f"left ({error}); start it again from its last checkpoint"
                ) from error
            self._refusal = str(error)
            return None, str(self._talk.decide(verdict, self._refusal))
        except Exception as error:
            wrong = self._talk.decide(verdict, f"{type(error).__name__}: {error}")
            outcome = None
        return (None, wrong) if wrong else (outcome, "")

    def _as_ordered(self, taken: Taken, prepared: Prepared | None) -> Outcome:
        order, generation = self._order, self._generation
        if order.is_fresh:
            self._talk.meet("taken", self._key, order.old_mesh.members)  # nobody leaves while others still ask
            generation = Generation.enter(self._talk, self._key, order.members, order.backend)
            taken = taken.renumbered(generation.numbers_from(order.old_ranks))
        else:
            self._talk.meet("come", self._key, order.members)
        assert generation is not None
        if prepared is None:
            return Outcome(self._moved(taken, generation, order.mesh, self._options), generation, order.mesh)
        return Outcome(move(taken, prepared, self._options), generation, order.mesh)

    def _moved(self, taken: Taken, generation: Generation, wish: MeshWish, options: SwitchOptions) -> Switched:
        """Moves to a layout whose model is made here; all hear of it where one cannot make it."""
        mesh = generation.mesh(wish)
        try:
            prepared = self._blueprint.prepare(mesh)
        except Exception as error:
            taken = replace(taken, refusal=f"{type(error).__name__}: {error}")
            prepared = Prepared(self._blueprint, mesh, None, None)
        return move(taken, prepared, options)

    def _left(self, number: int, taken: Taken, wrong: str) -> tuple[list[int], MeshWish]:
        """Returns the processes that are left, and the layout in which they can go on."""
        order, talk = self._order, self._talk
        key = f"{order.number}.{number}"
        talk.say("is left", key, not taken.released)
        left: list[int] = talk.decide(f"left {key}", talk.wait_for("is left", key, order.members))
        are_whole = all(talk.said("is left", key, member) for member in left)
        mesh = next((mesh for mesh in (order.old_mesh, order.mesh) if set(mesh.members) <= set(left)), None)
        if talk.number not in left or mesh is None or not are_whole:
            raise LostRun(
                f"world: a switch failed ({wrong}), and processes {left} do not have the whole run; start it again "
                f"from its last checkpoint{'' if are_whole else ', or set keep_source for the next time'}"
            )
        return left, mesh

    def _anew(self, left: list[int], mesh: MeshWish, taken: Taken) -> Outcome:
        """Moves the old state to a layout of the processes that are left."""
        order = self._order
        generation = Generation.enter(self._talk, self._key, left, order.backend)
        taken = taken.renumbered(generation.numbers_from(order.old_ranks))
        switched = self._moved(taken, generation, mesh, replace(self._options, keep_source=True))
        went_back = mesh == order.old_mesh
        return Outcome(switched, generation, mesh, went_back, self._refusal if went_back else "")
