"""Saves Triton's interpreter work that it repeats, where tests run in it."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from tests.ops.kernels.device import INTERPRETED


@pytest.fixture(autouse=True, scope="session")
def functions_are_called_at_once() -> Iterator[None]:
    """Lets kernels call functions as they are, which is half of the time of these tests.

    Before such a call Triton looks through its whole language for what it replaces in the interpreter. The launch of
    the kernel has replaced it already, but for the parts that Triton's own functions name otherwise: those it replaces
    at the first call of a module, for good.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    with_a_look, looked_at = InterpretedFunction.__call__, set[str]()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = function.fn.__module__
        if module in looked_at or not module.startswith("triton."):
            return function.rewrite()(*args, **kwargs)
        looked_at.add(module)
        return with_a_look(function, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "__call__", call):
        yield
