"""Ctrl-C as a wish to stop after the step, not as an exception in the middle of it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """Whether somebody asked to stop: an instance is the `stop` that the loop asks."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turn the first SIGINT or SIGTERM into a request; the second one acts as usual."""
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(*_: object) -> None:
        interrupt.requested = True
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield interrupt
    finally:
        restore()
