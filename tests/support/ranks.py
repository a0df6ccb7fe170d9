"""Runs functions in several processes at once, as ranks of one group, and keeps the processes for later tests."""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MOST = 5
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "smet_compile.api",
    "smet_compile.runtime",
    "smet_compile.train_step",
]
_TIMEOUT = datetime.timedelta(seconds=120)


@dataclass
class _Failure:
    """Holds the text of an exception of a rank."""

    text: str


class Processes:
    """Keeps ``MOST`` processes that wait for work."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._preloaded = list(PRELOADED)
        atexit.register(self.stop)

    def preload(self, modules: Iterable[str]) -> None:
        """Has modules imported once for all processes, if none runs yet."""
        self._preloaded += modules

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``function(rank, world, *args)`` in ``world`` processes over gloo; returns what each rank returns."""
        if not self._workers:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((rank, world, Path(folder) / "store", function, args))
            results = [self._receive(pipe) for _, pipe in self._workers[:world]]
        failures = [(rank, each.text) for rank, each in enumerate(results) if isinstance(each, _Failure)]
        if failures:
            self.stop()  # the others may wait for a message that never comes
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failures))
        return results

    def stop(self) -> None:
        """Ends the processes; the next call starts others."""
        for process, pipe in self._workers:
            process.kill()
            pipe.close()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self._preloaded)
        for _ in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((process, ours))

    @staticmethod
    def _receive(pipe: Connection) -> Any:
        if not pipe.poll(2 * _TIMEOUT.total_seconds()):
            return _Failure("no answer in time")
        try:
            return pipe.recv()
        except EOFError:
            return _Failure("the process ended")


def _work(pipe: Connection) -> None:
    import torch
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    while True:
        rank, world, store, function, args = pipe.recv()
        try:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=_TIMEOUT
            )
            torch.manual_seed(0)
            result = function(rank, world, *args)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            _clear_sharding_prop_cache()  # it keeps meshes, which equal later ones of the same ranks in other groups
        except Exception:
            result = _Failure(traceback.format_exc())
        pipe.send(result)


processes = Processes()
