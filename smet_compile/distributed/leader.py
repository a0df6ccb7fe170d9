"""Turns wishes for another layout into orders, on the first rank of a run, while the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from smet_compile.distributed.generation import Generation, MeshWish
from smet_compile.distributed.members import Members
from smet_compile.format.arguments import described

_STEPS_AHEAD = 2
"""A rank is at most one step ahead of another one, since both take part in every step."""
_ANSWER_SECONDS = 5.0
"""A process that waits answers a call at once, unless it is gone or busy with a new model."""


class Leader:
    """Takes one wish after the other through its stages.

    All members are called, and those that answer within a few seconds are of use. Where they are the ranks of the
    default process group, the new layout is prepared first; otherwise they form a new group as they switch.
    """

    def __init__(self, talk: Members, wish_file: str | None) -> None:
        self._talk, self._wish_file = talk, wish_file
        self._silent: set[int] = set()
        self.go_on_after(0)

    def go_on_after(self, wish: int) -> None:
        """Looks for the wish after this one, which is fulfilled, in a process group that nothing has befallen."""
        self._next_wish = wish + 1
        self._wish: dict[str, Any] | None = None
        self._stage, self._order, self._deadline = "", 0, 0.0
        self._is_group_damaged = False

    def step(self, step: int, total: int, generation: Generation, mesh: MeshWish) -> None:
        """Does what can be done before a step; never waits."""
        self._talk.beat(step)
        soon = step + _STEPS_AHEAD
        if soon >= total:
            return
        if self._wish is None:
            self._look_for_wish()
        elif self._stage == "called":
            self._hear_answers(soon, generation, mesh)
        elif self._stage == "preparing":
            self._hear_ready(soon, generation, mesh)

    def _look_for_wish(self) -> None:
        if self._wish_file is not None and os.path.exists(self._wish_file):
            _ask_by_file(self._talk, self._wish_file)
        self._wish = self._talk.wish(self._next_wish)
        if self._wish is None:
            return
        wrong = self._wrong_with(self._wish)
        if wrong is not None:
            self._refuse(wrong)
        else:
            self._call()

    def _call(self) -> None:
        self._write("called", {"kind": "call"}, _ANSWER_SECONDS)

    def _write(self, stage: str, order: dict[str, Any], seconds: float) -> None:
        self._order = self._talk.order(order | {"wish": self._next_wish})
        self._stage, self._deadline = stage, time.monotonic() + seconds

    def _wrong_with(self, wish: dict[str, Any]) -> str | None:
        count = self._talk.count
        unknown = [member for member in MeshWish.of(wish).members if member >= count]
        return f"mesh: expected ranks from 0 to {count - 1}, got {unknown}; start more processes" if unknown else None

    def _refuse(self, why: str) -> None:
        self._talk.answer(self._next_wish, f"refused: {why}")
        warn_of_refusal(self._next_wish, why)
        self._next_wish += 1
        self._wish = None

    def _hear_answers(self, soon: int, generation: Generation, mesh: MeshWish) -> None:
        assert self._wish is not None
        wanted = set(MeshWish.of(self._wish).members)
        others = [member for member in range(self._talk.count) if member not in mesh.members]
        answered = self._talk.heard("here", self._order, others)
        silent = set(others) - set(answered)
        if silent & (wanted | (silent - self._silent)) and time.monotonic() < self._deadline:
            return
        self._silent = silent
        living = sorted({*mesh.members, *answered})
        missing = sorted(wanted - set(living))
        if missing:
            self._refuse(f"processes {missing} did not answer within {_ANSWER_SECONDS:.0f} s; start them again")
            return
        is_fresh = living != generation.members or self._is_group_damaged
        if self._wish["prepare"] and not is_fresh:
            order = self._wish | {"kind": "prepare", "at": soon, "members": living}
            self._write("preparing", order, self._talk.patience)
        else:
            self._order_switch(soon, living, generation, mesh, is_fresh)

    def _order_switch(
        self, at: int, members: list[int], generation: Generation, mesh: MeshWish, is_fresh: bool
    ) -> None:
        assert self._wish is not None
        old = {"mesh": mesh.table, "names": list(mesh.names), "ranks": generation.members}
        about = {"at": at, "members": members, "is_fresh": is_fresh, "backend": generation.backend, "old": old}
        self._write("ordered", self._wish | about | {"kind": "switch"}, 0)

    def _hear_ready(self, soon: int, generation: Generation, mesh: MeshWish) -> None:
        assert self._wish is not None
        if self._talk.num_followed < self._order:  # the step at which it begins has not come
            self._deadline = time.monotonic() + self._talk.patience
            return
        failed = self._talk.heard("not ready", self._order, generation.members)
        ready = self._talk.heard("ready", self._order, generation.members)
        if len(ready) == len(generation.members):
            self._order_switch(soon, generation.members, generation, mesh, False)
        elif failed:
            reason = self._talk.said("not ready", self._order, failed[0])
            if reason:
                self._refuse(reason)
            else:
                self._is_group_damaged = True
                self._call()
        elif time.monotonic() > self._deadline:
            self._is_group_damaged = True
            self._call()


def warn_of_refusal(wish: int, why: str) -> None:
    """Warns that a wish is not fulfilled."""
    warnings.warn(f"wish {wish} is refused, and the run goes on as it is: {why}", stacklevel=3)


def wish_for(mesh: Any, names: Any, *, prepare: bool, stay: bool) -> dict[str, Any]:
    """Returns a wish, as it goes through the store.

    Raises:
        ValueError: ``mesh`` and ``names`` do not make a mesh of ascending ranks, each once.
    """
    try:
        table = torch.tensor(mesh, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        table = torch.empty(0)
    names = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else []
    if not table.numel() or not all(isinstance(each, str) for each in names) or len(names) != table.dim():
        raise ValueError(
            f"mesh: expected a list or a table of ranks with a name for each dimension, got {described(mesh)} and "
            f'{described(names)}; pass [[0, 1], [2, 3]] and names=("dp", "tp"), say'
        )
    flat = table.flatten().tolist()
    if len(set(flat)) != len(flat) or min(flat) < 0:
        raise ValueError(f"mesh: expected ranks from 0, each once, got {table.tolist()}; take other ranks")
    if not all(bool((table.diff(dim=dim) > 0).all()) for dim in range(table.dim())):
        raise ValueError(f"mesh: expected ranks that ascend along each dimension, got {table.tolist()}; sort them")
    return {"mesh": table.tolist(), "names": names, "prepare": prepare, "stay": stay}


def _ask_by_file(talk: Members, path: str) -> None:
    """Asks for what a file says, ``{"mesh": [[0, 1], [2, 3]], "names": ["dp", "tp"]}``, and removes it."""
    try:
        with open(path) as file:
            wish = json.load(file)
        talk.ask(wish_for(wish["mesh"], wish["names"], prepare=True, stay=True))
    except (ValueError, KeyError, TypeError, OSError) as error:
        warnings.warn(f"{path}: expected a wish for a layout, got {error}; it is removed", stacklevel=2)
    with contextlib.suppress(OSError):
        os.remove(path)
