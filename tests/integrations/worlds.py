"""Has a rank of ``tests.support.ranks`` look to accelerate as one that torchrun has started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState


@contextmanager
def launched(rank: int, world: int) -> Iterator[None]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 29500}
    names = {name: str(number) for name, number in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with mock.patch.dict(os.environ, names):
        forget_states()
        try:
            yield
        finally:
            forget_states()


def forget_states() -> None:
    """Makes the next ``Accelerator`` a first one, with settings of its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
