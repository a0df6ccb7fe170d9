"""Trains one run on some of many processes, and moves it to others, or to another layout, while it goes on.

A wish for another layout is written to the store of the process group, by any process that reaches it. The first rank
of the run turns it into an order for a step that no rank has begun; processes without a part of it sleep until then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import distributed

from smet_compile.distributed import members as talking
from smet_compile.distributed.generation import Generation, MeshWish, ready_for_threads, root_store
from smet_compile.distributed.leader import Leader, warn_of_refusal, wish_for
from smet_compile.distributed.members import Members
from smet_compile.distributed.run import Blueprint, Prepared, Run, data_rank
from smet_compile.distributed.safely import Order, SafeSwitch
from smet_compile.distributed.switch import Switched, SwitchOptions
from smet_compile.format.arguments import number as checked_number
from smet_compile.format.arguments import whole_number

Ranks = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class WorldOptions(SwitchOptions):
    """Says how a world treats wishes.

    Args:
        keep_source: keeps the old state until the new one is verified. A process that dies meanwhile then costs
            nothing but its part of the new layout: the others go on in the old one.
        chunk_bytes: the most that is sent at a time.
        way: how ranks send it, as ``SwitchOptions`` takes it.
        patience: seconds to wait for another process in a switch before it counts as gone.
        stall: seconds that a process which waits lets the run take for one step before it gives up.
        wish_file: path of a file that the first rank looks for before each step, and removes: a wish as JSON,
            ``{"mesh": [[0, 1], [2, 3]], "names": ["dp", "tp"]}``.
    """

    patience: float = 60.0
    stall: float = 1800.0
    wish_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("patience", self.patience, above=0)
        checked_number("stall", self.stall, above=0)


_DEFAULT = WorldOptions()


@dataclass(frozen=True)
class Change:
    """Says what became of an order to switch.

    Args:
        step: the step before which it was.
        mesh: the mesh of the run since then.
        went_back: whether the run is in its old layout, since a process failed meanwhile, or the switch was refused.
        pause: seconds from the end of the step before to the begin of the next.
        switched: counts of the transfer.
        refusal: says why the switch was refused; empty where it was not.
    """

    step: int
    mesh: MeshWish
    went_back: bool
    pause: float
    switched: Switched
    refusal: str = ""


class World:
    """Holds a run that trains on some of the processes, and moves it where it is asked to.

    Every rank of the default process group makes one, and goes through ``steps``::

        world = World(Blueprint(build, optimize), mesh=[0, 1], names=("dp",))
        for step in world.steps(1000):
            loss = world.model(batch(step, world.data_rank, world.num_data_ranks)).loss; ...
        # meanwhile, from any process:
        world.ask([[0, 1], [2, 3]], names=("dp", "tp"))

    Processes that start later take part by ``World.join``. Ranks in meshes are numbers of processes, which they keep:
    those of the default process group, then those that join, as they come.

    Args:
        blueprint: how the run is made for a mesh.
        mesh: the ranks that train, a list or a table of them, ascending.
        names: the names of the dimensions of the mesh.

    Attributes:
        number: the number of this process.
        run: what it has of the run; None while it has no part in it.
        mesh: the mesh that trains, in numbers of processes.
        changes: the outcome of each order to switch so far.
        on_change: called with each ``Change`` on the processes that took part, those that have no part any more
            included: there a process closes its files, say.

    Raises:
        ValueError: no process group; a mesh with a rank twice, with ranks that do not exist or do not ascend, or with
            another number of names than dimensions.
    """

    def __init__(
        self, blueprint: Blueprint, *, mesh: Ranks, names: Sequence[str], options: WorldOptions = _DEFAULT
    ) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "World: expected a process group, got none; call torch.distributed.init_process_group first, or join "
                "a world"
            )
        wish = wish_for(mesh, names, prepare=False, stay=True)
        size = distributed.get_world_size()
        if max(MeshWish.of(wish).members) >= size:
            raise ValueError(
                f"mesh: expected ranks from 0 to {size - 1}, each once, got {wish['mesh']}; start more processes, or "
                "take other ranks"
            )
        talk = Members.found(root_store(), options.patience)
        self._begin(blueprint, talk, options)
        self._generation: Generation | None = Generation(list(range(size)), distributed.get_backend())
        self.mesh: MeshWish | None = MeshWish.of(wish)
        self.run = blueprint.begin(self._generation.mesh(self.mesh))

    @classmethod
    def join(cls, blueprint: Blueprint, address: str, options: WorldOptions = _DEFAULT) -> World:
        """Makes the world of a process that starts later; ``steps`` waits there until the run is to use it.

        Args:
            address: that of the store, ``world.address`` of another process; under torchrun MASTER_ADDR:MASTER_PORT.

        Raises:
            ValueError: nobody answers there, or there is no world.
        """
        world = cls.__new__(cls)
        world._begin(blueprint, Members.join(address, options.patience), options)
        world._generation, world.mesh, world.run = None, None, None
        return world

    def _begin(self, blueprint: Blueprint, talk: Members, options: WorldOptions) -> None:
        self._blueprint, self._talk, self._options = blueprint, talk, options
        self.number, self.changes = talk.number, list[Change]()
        self._leader = Leader(talk, options.wish_file)
        self._num_steps, self._is_dismissed = 0, False
        self.on_change: Callable[[Change], None] | None = None
        self._prepared: _Preparing | None = None

    @property
    def address(self) -> str | None:
        """Returns where other processes join; None where the store cannot be reached from others."""
        return talking.address_of(self._talk.store)

    @property
    def num_processes(self) -> int:
        """Returns how many processes have ever taken part, those that left included."""
        return self._talk.count

    @property
    def model(self) -> Callable[..., Any]:
        """Returns what a step calls."""
        return self._own.forward

    @property
    def optimizer(self) -> Any:
        return self._own.optimizer

    @property
    def manager(self) -> Any:
        return self._own.manager

    @property
    def data_rank(self) -> int:
        """Returns which share of the data this rank reads, counted from 0."""
        return data_rank(self._own.mesh)[0]

    @property
    def num_data_ranks(self) -> int:
        """Returns into how many shares the data is divided."""
        return data_rank(self._own.mesh)[1]

    @property
    def _own(self) -> Run:
        if self.run is None:
            raise ValueError("world: expected a process with a part of the run, got one that waits; see world.run")
        return self.run

    def ask(self, mesh: Ranks, *, names: Sequence[str], prepare: bool = True, stay: bool = True) -> int:
        """Asks for another layout; returns the number of the wish.

        Wishes are fulfilled in the order in which they came, as long as steps are left. One that cannot be fulfilled is
        refused with a warning on the first rank, and the run goes on as it is.

        Args:
            prepare: makes groups and model of the new layout while the run goes on, and switches when all are ready.
                A layout with processes that have just joined is made while the run waits, in any case.
            stay: whether processes without a part of the new layout wait for a later one; else their steps end.
        """
        return self._talk.ask(wish_for(mesh, names, prepare=prepare, stay=stay))

    def answer(self, number: int, seconds: float = 60.0) -> str:
        """Returns what became of a wish.

        Raises:
            TimeoutError: nothing did in so many seconds.
        """
        return self._talk.answer_to(number, seconds)

    def steps(self, total: int, *, start: int = 0, stop: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Yields the numbers of the steps that this process is to make, from ``start`` up to ``total``.

        In between it switches, where that is ordered. A process without a part of the run waits here, until ``stop``
        returns True.

        Raises:
            LostRun: a part of the run's state is gone with a process that died, it can go on neither in a new layout
                nor in the old one, or the run does not go on.
        """
        total = whole_number("total", total, at_least=1)
        self._num_steps = whole_number("start", start, at_least=0)
        try:
            while self._num_steps < total and not self._is_dismissed and self._follow_orders(total, stop):
                if self.run is not None:
                    yield self._num_steps
                    self._num_steps += 1
        finally:
            self.end()

    def end(self) -> None:
        """Ends the steps of the processes that wait, if this is the run's first rank; ``steps`` calls it at its end."""
        if self._is_first:
            self._talk.order({"kind": "end"})

    @property
    def _is_first(self) -> bool:
        return self.run is not None and self.mesh is not None and self.number == self.mesh.members[0]

    def _follow_orders(self, total: int, stop: Callable[[], bool]) -> bool:
        """Follows the orders that are due; returns False where this process's steps end."""
        while True:
            if self.run is None:
                order = self._talk.wait_for_order(self._options.stall, stop)
                if order is None:
                    return False
            else:
                if self._is_first:
                    assert self._generation is not None and self.mesh is not None
                    self._leader.step(self._num_steps, total, self._generation, self.mesh)
                order = self._talk.next_order()
            if order is None or (order.get("at", self._num_steps) > self._num_steps and self.run is not None):
                return True
            self._talk.follow()
            if order["kind"] == "end":
                return False
            self._follow(order)
            if self._is_dismissed:
                return False

    def _follow(self, order: dict[str, Any]) -> None:
        if order["kind"] == "call":
            self._talk.say("here", order["number"])
        elif order["kind"] == "prepare":
            self._prepare(order)
        elif order["kind"] == "switch":
            self._switch(order)

    def _prepare(self, order: dict[str, Any]) -> None:
        """Makes the mesh of a layout, and begins to make its model, beside the run."""
        number, generation = order["number"], self._generation
        if self.number not in order["members"] or generation is None:
            return
        try:
            self._talk.meet("prepare", number, order["members"])
            mesh = generation.mesh(MeshWish.of(order))
        except (TimeoutError, RuntimeError):  # a process is gone; the next switch makes a new group without it
            self._talk.say("not ready", number)
        else:
            self._prepared = _Preparing(self._blueprint, mesh, self._talk, number)

    def _switch(self, order: dict[str, Any]) -> None:
        """Switches, and notes what came of it."""
        self._leader.go_on_after(order["wish"])
        if self.number not in order["members"]:
            self._prepared, self._generation = None, None
            return
        start = time.perf_counter()
        prepared = None if self._prepared is None or order["is_fresh"] else self._prepared.result()
        self._prepared = None
        safely = SafeSwitch(self._talk, self._blueprint, self._options, self._generation, Order.of(order))
        outcome = safely.run(self.run, prepared)
        self.run, self._generation, self.mesh = outcome.switched.run, outcome.generation, outcome.mesh
        self._num_steps = order["at"]
        pause = time.perf_counter() - start
        change = Change(order["at"], outcome.mesh, outcome.went_back, pause, outcome.switched, outcome.refusal)
        self.changes.append(change)
        if self._is_first:
            done = "went back to the old layout, since a process failed" if outcome.went_back else "switched"
            if outcome.refusal:
                self._talk.answer(order["wish"], f"refused: {outcome.refusal}")
                warn_of_refusal(order["wish"], outcome.refusal)
            else:
                self._talk.answer(order["wish"], f"{done} after {order['at']} steps, in {pause:.2f} s")
        self._is_dismissed = self.run is None and not order["stay"] and not outcome.went_back
        if self.on_change is not None:
            self.on_change(change)


def ask(address: str, mesh: Ranks, *, names: Sequence[str], seconds: float = 60.0) -> str:
    """Asks a run for another layout from outside, and returns what became of it; see ``World.ask``.

    Args:
        address: ``world.address`` of one of its processes.
        seconds: how long to wait for the answer.

    Raises:
        ValueError: nobody answers there, or it is no mesh. TimeoutError: nothing was said in time.
    """
    wish = wish_for(mesh, names, prepare=True, stay=True)
    talk = Members.visit(address, seconds)
    return talk.answer_to(talk.ask(wish), seconds)


class _Preparing:
    """Makes a model on the meta device in a thread of its own."""

    def __init__(self, blueprint: Blueprint, mesh: Any, talk: Members, order: int) -> None:
        self._made: Prepared | Exception | None = None
        ready_for_threads()
        self._thread = threading.Thread(target=self._work, args=(blueprint, mesh, talk, order), daemon=True)
        self._thread.start()

    def _work(self, blueprint: Blueprint, mesh: Any, talk: Members, order: int) -> None:
        try:
            self._made = blueprint.prepare(mesh)
        except Exception as error:
            self._made = error
            talk.say("not ready", order, f"{type(error).__name__}: {error}")
        else:
            talk.say("ready", order)

    def result(self) -> Prepared:
        """Waits for the model, and returns it."""
        self._thread.join()
        if isinstance(self._made, Prepared):
            return self._made
        raise RuntimeError("world: expected a prepared model, got none") from self._made
