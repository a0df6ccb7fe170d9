"""Trains one run on some of the ranks of a process group, and switches its layout at a step that all of them agree on.

A wish for another layout is written to the store of the process group, by any process that has it. The first rank of
the run gives it a step that no rank has begun; ranks without a part of the run sleep until then, and send nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from smet_compile.distributed.switch import Build, Optimize, Run, Switched, switch
from smet_compile.format.arguments import described, whole_number

Ranks = Sequence[int] | Sequence[Sequence[int]]
_PREFIX = "smet_compile/world"
_STEPS_AHEAD = 2
"""A rank is at most one step ahead of another one, since both take part in every step."""
_NAP_SECONDS = 0.02


class World:
    """Holds a run that trains on some ranks of the default process group, and moves it where it is asked to.

    Every rank of the process group makes one, and goes through ``steps``::

        world = World(build, optimize, mesh=[0, 1], names=("dp",))
        for step in world.steps(1000):
            loss = world.run.model(batch(step)).loss; ...
        # meanwhile, from any rank:
        world.ask([[0, 1], [2, 3]], names=("dp", "tp"))

    Args:
        build: makes the model for a ``DeviceMesh``, on the meta device; see ``switch``.
        optimize: makes optimizer and manager for it.
        mesh: the ranks that train, a list or a table of them, ascending. names: of the dimensions of the mesh.
        initialize: gives the first model its weights; by default ``smet_compile.materialize`` with ``seed=0``.

    Attributes:
        run: what this rank has of the run; None while it has no part in it. mesh: the mesh that trains.
        switched: the outcome of each switch so far.

    Raises:
        ValueError: no process group; a mesh with a rank twice, with ranks that do not exist or do not ascend, or with
            another number of names than dimensions.
    """

    def __init__(
        self,
        build: Build,
        optimize: Optimize,
        *,
        mesh: Ranks,
        names: Sequence[str],
        initialize: Any = None,
    ) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "World: expected a process group, got none; call torch.distributed.init_process_group first"
            )
        self._build, self._optimize = build, optimize
        self._store = distributed.distributed_c10d._get_default_store()
        self._number = int(self._store.add(f"{_PREFIX}s by rank {distributed.get_rank()}", 1))
        self.mesh = _make_mesh(_check("mesh", mesh, names))
        self.run: Run | None = None
        self.switched: list[Switched] = []
        self._num_switches, self._num_steps = 0, 0
        if self._is_active:
            model = build(self.mesh)
            (_materialize if initialize is None else initialize)(model)
            self.run = Run(model, *optimize(model), self.mesh)

    @property
    def _is_active(self) -> bool:
        return bool((self.mesh.mesh == distributed.get_rank()).any())

    @property
    def _is_first(self) -> bool:
        return distributed.get_rank() == int(self.mesh.mesh.min())

    def ask(self, mesh: Ranks, *, names: Sequence[str]) -> None:
        """Asks for another layout. Wishes are fulfilled in the order in which they came, two steps later or more.

        One that comes in the last two steps is not fulfilled.
        """
        wish = _check("mesh", mesh, names)
        self._wish({"mesh": wish})

    def _wish(self, wish: dict[str, Any]) -> None:
        number = int(self._store.add(self._key("number"), 1))
        self._store.set(self._key(f"wish {number}"), json.dumps(wish))

    def _key(self, name: str) -> str:
        return f"{_PREFIX} {self._number}/{name}"

    def steps(self, total: int) -> Iterator[int]:
        """Yields the numbers of the steps that this rank is to make, up to ``total``, and switches in between.

        A rank without a part of the run waits here.
        """
        total = whole_number("total", total, at_least=1)
        while self._num_steps < total:
            wish = self._due(total) if self._is_active else self._wait()
            if wish is None:
                yield self._num_steps
                self._num_steps += 1
            elif "end" in wish:
                break
            else:
                self._num_steps = int(wish["at"])
                self._follow(wish["mesh"])
        if self._is_active and self._is_first:
            self._store.set(self._key("end"), "")

    def _follow(self, wish: list[Any]) -> None:
        mesh = _make_mesh(wish)
        switched = switch(self.run, self._build, self._optimize, mesh)
        self.run, self.mesh = switched.run, mesh
        self.switched.append(switched)
        self._num_switches += 1

    def _due(self, total: int) -> dict[str, Any] | None:
        """Returns the wish that is due before this step; gives the next one its step, on the first rank."""
        number = self._num_switches + 1
        at = self._key(f"at {number}")
        soon = self._num_steps + _STEPS_AHEAD
        is_asked = self._is_first and soon < total and self._store.check([self._key(f"wish {number}")])
        if is_asked and not self._store.check([at]):
            self._store.set(at, str(soon))
        if not self._store.check([at]):
            return None
        step = int(self._store.get(at))
        if step != self._num_steps:
            return None
        return self._read(number) | {"at": step}

    def _wait(self) -> dict[str, Any]:
        """Returns the next wish that has a step, or the end."""
        number = self._num_switches + 1
        at = self._key(f"at {number}")
        while True:
            if self._store.check([self._key("end")]):
                return {"end": True}
            if self._store.check([at]):
                return self._read(number) | {"at": int(self._store.get(at))}
            time.sleep(_NAP_SECONDS)

    def _read(self, number: int) -> dict[str, Any]:
        key = self._key(f"wish {number}")
        self._store.wait([key], timedelta(seconds=60))
        wish: dict[str, Any] = json.loads(self._store.get(key))
        return wish


def _materialize(model: nn.Module) -> None:
    from smet_compile.convert import materialize

    materialize(model, seed=0)


def _check(name: str, ranks: Any, names: Any) -> list[Any]:
    """Returns the table of ranks and the names of its dimensions; raises ValueError where they make no mesh."""
    try:
        table = torch.tensor(ranks, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        table = torch.empty(0)
    names = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else []
    if not table.numel() or not all(isinstance(each, str) for each in names) or len(names) != table.dim():
        raise ValueError(
            f"{name}: expected a list or a table of ranks with a name for each dimension, got {described(ranks)} and "
            f'{described(names)}; pass [[0, 1], [2, 3]] and names=("dp", "tp"), say'
        )
    flat, size = table.flatten().tolist(), distributed.get_world_size()
    if len(set(flat)) != len(flat) or not all(0 <= rank < size for rank in flat):
        raise ValueError(
            f"{name}: expected ranks from 0 to {size - 1}, each once, got {table.tolist()}; start more processes, or "
            "take other ranks"
        )
    if not all(bool((table.diff(dim=dim) > 0).all()) for dim in range(table.dim())):
        raise ValueError(f"{name}: expected ranks that ascend along each dimension, got {table.tolist()}; sort them")
    return [table.tolist(), names]


def _make_mesh(wish: list[Any]) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    table, names = wish
    kind = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mesh = DeviceMesh(kind, table, mesh_dim_names=tuple(names))
    for dim in names if len(names) > 1 else ():
        mesh[dim]  # made on all ranks, in one order
    return mesh
