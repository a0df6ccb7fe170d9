"""Starts processes of a world one by one, and ends some without warning; the store is here, and outlives them all."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from smet_compile.distributed import SwitchOptions, World, WorldOptions, safely
from smet_compile.distributed.switch import move
from tests.support.ranks import PRELOADED


class Elastic:
    """Hosts the store of a world, and holds its processes by number."""

    def __init__(self) -> None:
        self._store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.address = f"127.0.0.1:{self._store.port}"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._processes: list[tuple[Any, Any]] = []

    def __enter__(self) -> Elastic:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _pipe in self._processes:
            process.kill()

    def start(self, count: int, function: Callable[..., Any], *args: Any) -> None:
        """Starts the first processes: ``function(address, rank, *args)`` in a process group of all of them."""
        for rank in range(count):
            self._start(function, rank, count, args)

    def join(self, function: Callable[..., Any], *args: Any) -> int:
        """Starts one more, without a process group; returns how many there are."""
        self._start(function, len(self._processes), None, args)
        return len(self._processes)

    def _start(self, function: Callable[..., Any], rank: int, count: int | None, args: Any) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self.address, rank, count, function, args))
        process.start()
        theirs.close()
        self._processes.append((process, ours))

    def result(self, number: int, seconds: float = 120.0) -> Any:
        """Returns what a process returned; None where it was killed."""
        process, pipe = self._processes[number]
        assert pipe.poll(seconds), f"process {number} hangs"
        try:
            kind, value = pipe.recv()
        except EOFError:
            return None
        assert kind == "returned", f"process {number}: {value}"
        process.join(seconds)
        assert process.exitcode == 0, f"process {number} ended with {process.exitcode}"
        return value

    def signal(self, number: int, kind: int) -> None:
        """Sends a signal to a process."""
        os.kill(self._processes[number][0].pid, kind)

    def kill(self, number: int) -> int:
        """Ends a process without warning; returns how many died of a signal, be it before: 1 or 0."""
        process, _ = self._processes[number]
        process.kill()
        process.join(60)
        return int(process.exitcode == -signal.SIGKILL)

    def wait_until_some_died(self, *numbers: int, seconds: float = 120.0) -> None:
        """Waits until one of the processes has ended."""
        sentinels = [self._processes[number][0].sentinel for number in numbers]
        assert multiprocessing.connection.wait(sentinels, seconds), f"processes {numbers} hang"


def _work(pipe: Any, address: str, rank: int, count: int | None, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    try:
        if count is not None:
            host, port = address.split(":")
            store = distributed.TCPStore(host, int(port), is_master=False)
            distributed.init_process_group(
                "gloo", store=distributed.PrefixStore("first group", store), rank=rank, world_size=count
            )
        pipe.send(("returned", function(address, rank, *args)))
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
    pipe.close()
    os._exit(0)  # groups whose other ranks are gone need no farewell


class Mortal:
    """Ends its process at a random moment of a switch, before it has said that it is done."""

    def __init__(self, seed: int, most_seconds: float) -> None:
        self._draw, self._most_seconds = random.Random(seed), most_seconds

    def arm(self) -> None:
        """Has one of the next two switches be the last."""
        self._left, self._moment = self._draw.randrange(2), self._draw.choice(["before", "during", "after"])
        safely.move = self._move

    def _move(self, taken: Any, prepared: Any, options: SwitchOptions) -> Any:
        is_last, self._left = self._left == 0, self._left - 1
        if is_last and self._moment == "before":
            die()
        if is_last and self._moment == "during":
            threading.Thread(target=self._die_soon, daemon=True).start()
        found = move(taken, prepared, options)
        if is_last:
            die()
        return found

    def _die_soon(self) -> None:
        time.sleep(self._draw.random() * self._most_seconds)
        die()


def die() -> None:
    """Ends this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


def options(**more: Any) -> WorldOptions:
    return WorldOptions(keep_source=True, patience=3.0, **more)


def wait_for(world: World, count: int) -> None:
    """Waits until so many processes have joined."""
    while world.num_processes < count:
        time.sleep(0.01)
