"""Makes process groups and meshes anew while a run goes on."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from smet_compile.distributed.members import PREFIX, Members

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class MeshWish:
    """Says which members form a mesh: a table of their numbers, and the names of its dimensions."""

    table: Any
    names: tuple[str, ...]

    @classmethod
    def of(cls, wish: Mapping[str, Any]) -> MeshWish:
        """Reads it from a wish or an order."""
        return cls(wish["mesh"], tuple(wish["names"]))

    @property
    def members(self) -> list[int]:
        return sorted(torch.tensor(self.table).flatten().tolist())


@dataclass(frozen=True)
class Generation:
    """Knows the default process group: its ranks are these members, in ascending order."""

    members: list[int]
    backend: str

    @classmethod
    def enter(cls, talk: Members, name: str, members: Sequence[int], backend: str) -> Generation:
        """Replaces the default process group by one of ``members``; each of them calls.

        Raises:
            TimeoutError: not all of them do, as long as this one waits.
        """
        leave()
        talk.meet("enter", name, members)
        store = talk.prefixed(f"group {name}")
        rank = list(members).index(talk.number)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=len(members), timeout=_TIMEOUT)
        return cls(list(members), backend)

    def numbers_from(self, old: Sequence[int]) -> dict[int, int]:
        """Returns the rank here of each rank of a group that had the members ``old``, as far as they are here."""
        return {rank: self.members.index(member) for rank, member in enumerate(old) if member in self.members}

    def mesh(self, wish: MeshWish) -> Any:
        """Makes a mesh, and the groups of its dimensions; every rank of the default process group calls."""
        table = torch.tensor(wish.table).clone()
        table.apply_(self.members.index)
        mesh = DeviceMesh("cuda" if self.backend == "nccl" else "cpu", table, mesh_dim_names=wish.names)
        for dim in wish.names if len(wish.names) > 1 else ():
            mesh[dim]  # made on all ranks, in one order
        return mesh


def begin_group(backend: str, patience: float = 600.0) -> None:
    """Makes the default process group of the ranks that torchrun started.

    torchrun keeps one store when it starts processes anew, with the addresses of those that are gone. So the ranks
    first find each other: each writes a text that is new, and the first one answers with all of them.

    Raises:
        TimeoutError: some rank does not come as long as this one waits.
    """
    store, rank, size = next(iter(distributed.rendezvous("env://")))
    own, deadline = secrets.token_hex(8), time.monotonic() + patience
    name = _welcome(store, own, size, deadline) if rank == 0 else _be_welcomed(store, own, rank, deadline)
    store = distributed.PrefixStore(name, store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def _welcome(store: Any, own: str, size: int, deadline: float) -> str:
    """Answers to all ranks until each has read the answer to its newest text; returns the name of the group."""
    others = list(range(1, size))
    while True:
        texts = {str(rank): _text(store, f"{PREFIX} hello {rank}") for rank in others}
        store.set(f"{PREFIX} welcome", json.dumps([own, texts]))
        if all(_text(store, f"{PREFIX} seen {rank}") == own for rank in others):
            return own
        _nap(deadline, "all ranks")


def _be_welcomed(store: Any, own: str, rank: int, deadline: float) -> str:
    store.set(f"{PREFIX} hello {rank}", own)
    while True:
        name, texts = json.loads(_text(store, f"{PREFIX} welcome") or '["", {}]')
        if texts.get(str(rank)) == own:
            store.set(f"{PREFIX} seen {rank}", name)
            return str(name)
        _nap(deadline, "the first rank")


def _text(store: Any, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _nap(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"torchrun: expected {whom} to come, got nothing in time; see whether all were started")
    time.sleep(0.02)


def root_store() -> Any:
    """Returns the store of the default process group, without prefixes."""
    store = distributed.distributed_c10d._get_default_store()
    while isinstance(store, distributed.PrefixStore):
        store = store.underlying_store
    return store


def leave() -> None:
    """Leaves the default process group, with all that torch keeps of its meshes under names that come again."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    forget_graphs()


def ready_for_threads() -> None:
    """Has this thread use fake tensors before another one does.

    torch 2.11 registers a stand-in for missing cards in the thread that uses fake tensors first, as DTensor does, and
    crashes in others once that one has ended.
    """
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        pass


def forget_graphs() -> None:
    """Drops all compiled graphs, since those of an old model count against the most that one function may have."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
