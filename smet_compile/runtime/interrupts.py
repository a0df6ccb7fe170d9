"""Has interrupts wait until a change that must not be left halfway is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WAITS = "_smet_waits"
"""Marks the handlers that wait."""


@contextmanager
def waiting_interrupts() -> Iterator[None]:
    """Calls the handler of Ctrl-C or SIGTERM at the end, where one has come. A second one is handled at once.

    A signal is left alone where its handler is not a function of Python. Threads other than the first get none. Within
    another of these contexts nothing is changed: they wait for the end of the outer one.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: each for number, each in handlers.items() if callable(each) and not hasattr(each, _WAITS)}
    waiting: list[tuple[int, Any]] = []

    def wait(number: int, frame: Any) -> None:
        if not waiting:
            waiting.append((number, frame))
            return
        waiting.clear()
        handlers[number](number, frame)

    setattr(wait, _WAITS, True)
    for number in handlers:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            number, frame = waiting[0]
            handlers[number](number, frame)
