"""Has the processes of a world agree through a store, which outlives any process group and any of them.

Each process has a number that it keeps, its member number. Wishes are numbered as they come. The first rank of the run
writes orders, also numbered, which all members follow one by one; each says what happens, and before which step.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from torch import distributed

from smet_compile.format.arguments import described

PREFIX = "smet_compile/world"
_NAP_SECONDS = 0.01


class LostRun(RuntimeError):
    """Tells that a part of a run's state is gone; it can go on from its last checkpoint alone."""


class Members:
    """Talks to the other processes of a world.

    Args:
        store: a store that all processes reach. world: the world's name in it. number: this process's.
        patience: seconds to wait for another process before it counts as gone.
    """

    def __init__(self, store: Any, world: str, number: int, patience: float) -> None:
        self.store, self.number, self.patience = store, number, patience
        self._prefix, self._world = f"{PREFIX} {world}/", world
        self._num_orders = 0

    @classmethod
    def found(cls, store: Any, patience: float) -> Members:
        """Begins a world among the ranks of the default process group; every rank calls, and is a member."""
        rank, size = distributed.get_rank(), distributed.get_world_size()
        box = [secrets.token_hex(8)]  # a store may outlive the processes, and hold what earlier ones wrote
        distributed.broadcast_object_list(box, src=0)
        members = cls(store, box[0], rank, patience)
        if rank == 0:
            members._set("count", size)
            store.set(PREFIX, members._world)
        members._wait_for(lambda: members._has("count"), "the first rank to begin the world")
        return members

    @classmethod
    def join(cls, address: str, patience: float) -> Members:
        """Takes part in a world that others have begun, as its next member."""
        store = open_store(address, patience)
        world = _name_of_world(store, address, patience)
        members = cls(store, world, 0, patience)
        members._num_orders = int(store.add(members._prefix + "orders", 0))  # first, to miss none that counts on it
        members.number = int(store.add(members._prefix + "count", 1)) - 1
        return members

    @classmethod
    def visit(cls, address: str, patience: float) -> Members:
        """Talks to a world without taking part in it."""
        store = open_store(address, patience)
        return cls(store, _name_of_world(store, address, patience), -1, patience)

    @property
    def count(self) -> int:
        """Returns how many processes have ever been members."""
        return int(self.store.add(self._prefix + "count", 0))

    def ask(self, wish: dict[str, Any]) -> int:
        """Writes down a wish; returns its number."""
        number = int(self.store.add(self._prefix + "wishes", 1))
        self._set(f"wish {number}", wish)
        return number

    def wish(self, number: int) -> dict[str, Any] | None:
        """Returns a wish; None while there is none of this number."""
        return self._get(f"wish {number}") if self._has(f"wish {number}") else None

    def answer(self, number: int, text: str) -> None:
        """Tells whoever waits what became of a wish."""
        self._set(f"answer {number}", text)

    def answer_to(self, number: int, seconds: float) -> str:
        """Returns what became of a wish.

        Raises:
            TimeoutError: nothing was said in so many seconds.
        """
        self._wait_for(lambda: self._has(f"answer {number}"), f"an answer to wish {number}", seconds)
        text: str = self._get(f"answer {number}")
        return text

    def order(self, order: dict[str, Any]) -> int:
        """Writes the next order, and returns its number; the first rank of the run alone does."""
        number = self._num_orders + 1
        self._set(f"order {number}", order)
        self.store.add(self._prefix + "orders", 1)
        return number

    def next_order(self) -> dict[str, Any] | None:
        """Returns the order that this member follows next; None while there is none."""
        key = f"order {self._num_orders + 1}"
        return self._get(key) | {"number": self._num_orders + 1} if self._has(key) else None

    @property
    def num_followed(self) -> int:
        """Returns how many orders this member has followed."""
        return self._num_orders

    def follow(self) -> None:
        """Counts the next order as done."""
        self._num_orders += 1

    def say(self, what: str, order: Any, value: Any = "") -> None:
        """Says something about an order, for all to read."""
        self._set(f"{what} {order} {self.number}", value)

    def heard(self, what: str, order: Any, members: Iterable[int]) -> list[int]:
        """Returns which of the members said it."""
        return [member for member in members if self._has(f"{what} {order} {member}")]

    def said(self, what: str, order: Any, member: int) -> Any:
        """Returns what a member said about an order."""
        return self._get(f"{what} {order} {member}")

    def decide(self, what: str, value: Any) -> Any:
        """Returns the first value that any member gives for this, whoever it was."""
        chosen = self.store.compare_set(self._prefix + what, "", json.dumps(value))
        return json.loads(chosen)

    def decided(self, what: str) -> bool:
        return self._has(what)

    def beat(self, step: int) -> None:
        """Shows that the run goes on."""
        self._set("step", step)

    def wait_for_order(self, stall: float, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Returns the next order, however long the run goes on without one; None once ``stop`` returns True.

        Raises:
            LostRun: the run has not gone on for ``stall`` seconds.
        """
        last, since = None, time.monotonic()
        while (order := self.next_order()) is None and not stop():
            step = self._get("step") if self._has("step") else None
            if step != last:
                last, since = step, time.monotonic()
            if time.monotonic() - since > stall:
                raise LostRun(
                    f"world: expected the run to go on after step {last}, got nothing for {stall:.0f} s; start "
                    "it again from its last checkpoint"
                )
            time.sleep(_NAP_SECONDS)
        return order

    def wait_for(self, what: str, order: Any, members: Sequence[int], or_decided: str = "") -> list[int]:
        """Returns the members who said it: all of them, or those who did while this one waits."""
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            found = self.heard(what, order, members)
            if len(found) == len(members) or (or_decided and self._has(or_decided)):
                return found
            time.sleep(_NAP_SECONDS)
        return self.heard(what, order, members)

    def meet(self, what: str, order: Any, members: Sequence[int]) -> None:
        """Waits until all members have come here.

        Raises:
            TimeoutError: some do not come as long as this one waits; on all that came, or on none.
        """
        self.say(what, order)
        present = self.wait_for(what, order, members, or_decided=f"{what} {order} met")
        missing = self.decide(f"{what} {order} met", sorted(set(members) - set(present)))
        if missing:
            raise TimeoutError(f"world: expected processes {list(members)}, got nothing from {missing} in time")

    def prefixed(self, name: str) -> Any:
        """Returns the store with a prefix of its own, for a process group."""
        return distributed.PrefixStore(self._prefix + name, self.store)

    def _wait_for(self, is_done: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        deadline = time.monotonic() + (self.patience if seconds is None else seconds)
        while not is_done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"world: expected {what}, got nothing in time; see whether the run is alive")
            time.sleep(_NAP_SECONDS)

    def _set(self, key: str, value: Any) -> None:
        self.store.set(self._prefix + key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(self._prefix + key))

    def _has(self, key: str) -> bool:
        return bool(self.store.check([self._prefix + key]))


def address_of(store: Any) -> str | None:
    """Returns where other processes reach a store: host:port, or the path of a file; None for neither."""
    if isinstance(store, distributed.TCPStore):
        return f"{store.host}:{store.port}"
    return f"file://{getattr(store, 'path', '')}" if isinstance(store, distributed.FileStore) else None


def open_store(address: str, seconds: float) -> Any:
    """Returns the store at an address.

    Raises:
        ValueError: it is no address, or nobody answers there.
    """
    if isinstance(address, str) and address.startswith("file://"):
        return distributed.FileStore(address.removeprefix("file://"), -1)
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdigit():
        raise ValueError(f"address: expected host:port, such as 10.0.0.1:29500, got {described(address)}")
    try:
        return distributed.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=seconds))
    except distributed.DistError as error:
        raise ValueError(
            f"address: expected the store of a run at {address}, got no answer; see whether the run is alive"
        ) from error


def _name_of_world(store: Any, address: str, patience: float) -> str:
    deadline = time.monotonic() + patience
    while not store.check([PREFIX]):
        if time.monotonic() > deadline:
            raise ValueError(f"address: expected a World at {address}, got a store without one; start the run first")
        time.sleep(_NAP_SECONDS)
    name: str = store.get(PREFIX).decode()
    return name
