"""Keeps values instead of dense weights for backward, in eager mode.

Autograd saves the weight of every linear layer until its backward: with unpacked weights that is the whole dense model.
Saved-tensor hooks replace a saved tensor that is an unpacked weight (or a view of one, or autocast's low-precision copy
of one) by a recipe, from which backward unpacks it again.

The hooks are in force during a forward, and have to be removed however it ends. torch runs a module's forward hooks
when the forward returns or raises an ``Exception``, but not after a ``KeyboardInterrupt`` or another ``BaseException``.
Such a forward is over when the frame that called its hooks no longer runs. It is ended here as soon as that frame is
freed or, where a traceback keeps the frame, when the next forward of the thread begins.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from smet_compile.format import Topology
from smet_compile.ops.library import CHANGED, CountsChanges
from smet_compile.ops.torch_insides import (
    PackAndUnpack,
    address_of_storage,
    saved_tensor_hooks_are_enabled,
    saved_tensor_hooks_in_force,
)
from smet_compile.shards import unwrap


class Context(Protocol):
    """Changes a setting during a forward. ``end`` does nothing where an interrupt came before ``begin``."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def is_innermost(self) -> bool:
        """Tells whether no other context of its kind was begun since, so that ``end`` ends no other."""


C = TypeVar("C", bound=Context)


class _Forward(Generic[C]):
    """Records a forward that has begun.

    Args:
        module: the module that is called. caller: the frame that calls its hooks.
        context: the context in force during the forward; None where it needs none.
    """

    def __init__(self, module: nn.Module, caller: FrameType, context: C | None) -> None:
        self.module = module
        self.context = context
        self.caller = id(caller)
        self.call: Any = caller  # keeps the frame, so that its id is not reused; a weak reference may replace it


class Forwards(threading.local, Generic[C]):
    """Holds the forwards that have begun in this thread, innermost last."""

    def __init__(self) -> None:
        self._stack: list[_Forward[C]] = []

    @property
    def context(self) -> C | None:
        """Returns the innermost context; None where there is none."""
        return next((forward.context for forward in reversed(self._stack) if forward.context is not None), None)

    def enter(self, module: nn.Module, caller: FrameType, context: C | None) -> None:
        """Begins a forward of ``module`` and its context. ``caller`` is the frame that calls its hooks."""
        forward = _Forward(module, caller, context)
        call = _object_of_call(caller)
        if call is not None:
            forward.call = weakref.ref(call, _Freed(self._stack, forward))
        self._stack.append(forward)
        if context is not None:
            context.begin()

    def exit(self, module: nn.Module) -> None:
        """Ends the innermost forward of ``module`` and all that began within it; does nothing where there is none."""
        if not any(forward.module is module for forward in self._stack):
            return
        ended = None
        while ended is not module:
            ended = self._stack[-1].module
            _end_last(self._stack)

    def exit_broken(self, frame: FrameType | None) -> None:
        """Ends the forwards that were interrupted. ``frame`` is the innermost frame that runs."""
        running = set()
        while self._stack and frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        while self._stack and self._stack[-1].caller not in running and _can_end_last(self._stack):
            _end_last(self._stack)


class _Freed(Generic[C]):
    """Ends a forward that is still in the stack when its call is freed, since it was interrupted."""

    def __init__(self, stack: list[_Forward[C]], forward: _Forward[C]) -> None:
        self._stack = stack
        self._forward = weakref.ref(forward)
        self._thread = threading.get_ident()

    def __call__(self, _: Any) -> None:
        forward = self._forward()
        if forward is None:
            return
        forward.caller = 0  # no frame has this id, while the old id may be reused
        while forward in self._stack and self._thread == threading.get_ident() and _can_end_last(self._stack):
            _end_last(self._stack)


def _can_end_last(stack: list[_Forward[C]]) -> bool:
    """Tells whether the innermost forward can be ended now: its context must not lie below somebody else's."""
    context = stack[-1].context
    return context is None or context.is_innermost()


def _end_last(stack: list[_Forward[C]]) -> None:
    """Ends the innermost forward. It leaves the stack last, so that an interrupt in between loses nothing."""
    context = stack[-1].context
    if context is not None:
        context.end()
    stack.pop()


def _object_of_call(caller: FrameType) -> Any:
    """Returns an object that lives as long as the call of a module that ``caller`` is part of; None if none is found.

    A frame cannot be referenced weakly, and a strong reference would keep it alive. torch calls hooks from a function
    named ``inner``, which each call of a module makes anew.
    """
    call = caller.f_back
    return None if call is None or caller.f_code.co_name != "inner" else call.f_locals.get("inner")


_RECIPE = "smet.recipe"


@dataclass(frozen=True)
class _Recipe:
    """Unpacks a weight again from the tensors that the forward used, whatever the module holds later."""

    values: Tensor
    version: int
    bits: Tensor
    lists: Tensor
    layout: str
    owner: CountsChanges
    num_changes: int

    def dense(self) -> Tensor:
        if self.version != self.values._version or self.num_changes != self.owner.num_changes:
            raise RuntimeError(CHANGED)
        with torch.no_grad():
            dense: Tensor = torch.ops.smet.unpack(self.values, self.bits, self.lists, self.layout, None, None, False)
        return dense


@dataclass(frozen=True)
class _Kept:
    """Stands for a dense weight, or for a view or a converted copy of it, in what autograd saves."""

    recipe: _Recipe
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    rewrap: Callable[[Tensor], Tensor]

    def restore(self) -> Tensor:
        return self.rewrap(self.recipe.dense().to(self.dtype).as_strided(self.size, self.stride, self.offset))


@dataclass(frozen=True)
class _Saved:
    """Holds any other saved tensor, and checks it for changes in place, as autograd does where there are no hooks."""

    tensor: Tensor
    version: int

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self.version}"
            )
        return self.tensor


@dataclass(frozen=True)
class _Passed:
    """Holds any other saved tensor in the form that the hooks below ours gave it."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    def restore(self) -> Tensor:
        return self.unpack(self.packed)


class _Hooks:
    """Holds one forward's saved-tensor hooks, and the recipes of the dense weights alive in it, by storage.

    All other tensors go to the hooks that were in force before (those of activation checkpointing, or of a user).
    """

    def __init__(self) -> None:
        self.below: PackAndUnpack | None = None
        self.live: dict[int, tuple[StorageWeakRef, int, _Recipe]] = {}
        self.context = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.is_begun = False

    def begin(self) -> None:
        self.below = saved_tensor_hooks_in_force()
        self.is_begun = True
        self.context.__enter__()

    def end(self) -> None:
        if self.is_begun:
            self.context.__exit__(None, None, None)
            self.is_begun = False

    def is_innermost(self) -> bool:
        top = saved_tensor_hooks_in_force()
        return not self.is_begun or (top is not None and getattr(top[0], "__self__", None) is self)

    def remember(self, dense: Tensor, recipe: _Recipe) -> None:
        # The weak reference keeps the storage's address from being used again while the entry stands.
        storage = StorageWeakRef(dense.untyped_storage())
        self.live[storage.cdata] = (storage, dense._version, recipe)

    def recipe(self, tensor: Tensor) -> _Recipe | None:
        if tensor.layout != torch.strided:
            return None
        storage = address_of_storage(tensor)
        if storage in self.live:
            _, version, recipe = self.live[storage]
            return recipe if tensor._version == version else None
        return _recipe_of_copy(tensor._base if tensor._base is not None else tensor)

    def pack(self, tensor: Tensor) -> _Saved | _Kept | _Passed:
        here, rewrap = unwrap(tensor)
        is_changed = here is not tensor and tensor._version > 0  # of a DTensor, that in it does not count
        recipe = None if is_changed else self.recipe(here)
        if recipe is not None:
            return _Kept(recipe, here.dtype, here.size(), here.stride(), int(here.storage_offset()), rewrap)
        if self.below is not None:
            pack, unpack = self.below
            return _Passed(pack(tensor), unpack)
        # A function that saves its own output would make a reference cycle with the tensor itself.
        return _Saved(tensor.detach(), tensor._version)

    @staticmethod
    def unpack(saved: _Saved | _Kept | _Passed) -> Tensor:
        return saved.restore()


_forwards: Forwards[_Hooks] = Forwards()


def _recipe_of_copy(copy: Tensor) -> _Recipe | None:
    """Returns the recipe of the weight that ``copy`` was converted from; None where it was not, or strides differ."""
    if copy.grad_fn is None or copy._version != 0 or copy.grad_fn.name() != "ToCopyBackward0":
        return None
    source = copy.grad_fn.next_functions[0][0]
    recipe: _Recipe | None = None if source is None else _notes(source).get(_RECIPE)
    same_place = recipe is not None and copy.device == recipe.values.device and copy.is_contiguous()
    return recipe if same_place else None


def _notes(node: Any) -> dict[str, Any]:
    """Returns the dict at a node of the autograd graph that is there for anybody's notes."""
    notes: dict[str, Any] = node.metadata
    return notes


def remember(dense: Tensor, values: Tensor, topology: Topology, owner: CountsChanges) -> None:
    """Notes that ``dense`` was unpacked from ``values`` of the weight ``owner``, if a forward has begun."""
    hooks = _forwards.context
    if hooks is None or dense.is_inference():
        return
    text = topology.layout.text
    recipe = _Recipe(values, values._version, topology.bits, topology.lists, text, owner, owner.num_changes)
    hooks.remember(dense, recipe)
    if dense.grad_fn is not None:
        _notes(dense.grad_fn)[_RECIPE] = recipe


def _new_hooks() -> _Hooks | None:
    """Returns hooks for a forward; None where they are of no use (no training) or in force already."""
    if not (torch.is_grad_enabled() and saved_tensor_hooks_are_enabled()):
        return None
    in_force = _forwards.context
    return None if in_force is not None and in_force.is_innermost() else _Hooks()


def _enter(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _begin(module, sys._getframe(1))


def _exit(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _forwards.exit(module)


def _enter_owner(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _begin(module, sys._getframe(1))


def _exit_owner(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _forwards.exit(module)


def _begin(module: nn.Module, caller: FrameType) -> None:
    """Begins a forward of ``module``. ``caller`` is the frame that calls the module's hooks, which outlives it."""
    _forwards.exit_broken(caller)
    _forwards.enter(module, caller, _new_hooks())


def run(forward: Callable[..., Any], module: nn.Module, *args: Any) -> Any:
    """Runs one forward of ``module`` under the hooks, in eager mode."""
    _begin(module, sys._getframe())
    try:
        return forward(module, *args)
    finally:
        _forwards.exit(module)


_OF_MODEL, _OF_OWNER = (-1, _enter, _exit), (-2, _enter_owner, _exit_owner)
"""The key of the hooks, and the hooks. torch gives each hook a key of its own, counted from zero, and a compiled graph
belongs to the keys that it was traced with: by those, equal blocks would share no graph."""


def install(module: nn.Module, owner: bool = False) -> None:
    """Runs the forwards of ``module`` under the hooks. A second call has no effect.

    The ``owner`` of a compact weight gets separate functions, which run in eager mode after a graph break.
    """
    key, enter, leave = _OF_OWNER if owner else _OF_MODEL
    before: Any = module._forward_pre_hooks
    if key not in before:
        before[key] = enter
        before.move_to_end(key, last=False)
        module._forward_hooks[key] = leave
        module._forward_hooks_always_called[key] = True


def uninstall(module: nn.Module) -> None:
    """Removes the hooks of ``module``."""
    for key, _, _ in (_OF_MODEL, _OF_OWNER):
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
            hooks.pop(key, None)


MAY_BE_COMPILED = (_enter, _exit)
"""Functions that Dynamo may compile by themselves: of a lone layer it compiles no other, and `fullgraph` wants one."""
