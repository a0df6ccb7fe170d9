"""Knows which forwards of modules are under way in a thread, and ends those that were broken off.

torch runs the hooks after a forward when it returns or raises an ``Exception``. After a ``KeyboardInterrupt``, or
another ``BaseException``, it runs none. Such a forward is over when the frame that called its hooks runs no more. It
is ended as soon as that frame is freed or, where a traceback keeps the frame, when the next forward of the thread
begins.
"""

from __future__ import annotations

import threading
import weakref
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from torch import nn


class Context(Protocol):
    """Holds during a forward. ``end`` does nothing where an interrupt came before ``begin``."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def is_innermost(self) -> bool:
        """Tells whether nothing else of its kind was begun since, so that ``end`` ends nothing else."""


C = TypeVar("C", bound=Context)


class _Forward(Generic[C]):
    """A forward under way.

    Args:
        module: whose forward it is. caller: the frame that calls the module's hooks.
        context: holds during the forward; None where it needs none.
    """

    def __init__(self, module: nn.Module, caller: FrameType, context: C | None) -> None:
        self.module = module
        self.context = context
        self.caller = id(caller)
        self.call: Any = caller  # keeps the number of the frame from being given away, unless a weak reference can tell


class Forwards(threading.local, Generic[C]):
    """The forwards under way in this thread, innermost last."""

    def __init__(self) -> None:
        self._stack: list[_Forward[C]] = []

    @property
    def context(self) -> C | None:
        """The innermost context; None where there is none."""
        return next((forward.context for forward in reversed(self._stack) if forward.context is not None), None)

    def enter(self, module: nn.Module, caller: FrameType, context: C | None) -> None:
        """Begins a forward of ``module`` and its context. ``caller``: the frame that calls its hooks."""
        forward = _Forward(module, caller, context)
        call = _object_of_call(caller)
        if call is not None:
            forward.call = weakref.ref(call, _Freed(self._stack, forward))
        self._stack.append(forward)
        if context is not None:
            context.begin()

    def exit(self, module: nn.Module) -> None:
        """Ends the innermost forward of ``module`` and whatever began within it; does nothing where there is none."""
        if not any(forward.module is module for forward in self._stack):
            return
        ended = None
        while ended is not module:
            ended = self._stack[-1].module
            _end_last(self._stack)

    def exit_broken(self, frame: FrameType | None) -> None:
        """Ends the forwards that were broken off. ``frame``: the innermost one that runs."""
        running = set()
        while self._stack and frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        while self._stack and self._stack[-1].caller not in running and _can_end_last(self._stack):
            _end_last(self._stack)


class _Freed(Generic[C]):
    """Ends a forward that is still in the stack when its call is freed: it was broken off."""

    def __init__(self, stack: list[_Forward[C]], forward: _Forward[C]) -> None:
        self._stack = stack
        self._forward = weakref.ref(forward)
        self._thread = threading.get_ident()

    def __call__(self, _: Any) -> None:
        forward = self._forward()
        if forward is None:
            return
        forward.caller = 0  # no frame has this number, while the old one may be given to another frame
        while forward in self._stack and self._thread == threading.get_ident() and _can_end_last(self._stack):
            _end_last(self._stack)


def _can_end_last(stack: list[_Forward[C]]) -> bool:
    """Tells whether the innermost forward can be ended out of turn: its context may be below one of somebody else."""
    context = stack[-1].context
    return context is None or context.is_innermost()


def _end_last(stack: list[_Forward[C]]) -> None:
    """Ends the innermost forward. It leaves the stack last, so that an interrupt in between loses nothing."""
    context = stack[-1].context
    if context is not None:
        context.end()
    stack.pop()


def _object_of_call(caller: FrameType) -> Any:
    """An object that lives as long as the call of a module that ``caller`` is part of; None where none is known.

    A frame cannot be referenced weakly, and a strong reference would keep it alive. torch calls hooks from a function
    that each call of a module makes anew, and names ``inner``.
    """
    call = caller.f_back
    return None if call is None or caller.f_code.co_name != "inner" else call.f_locals.get("inner")
