"""Keeps values instead of dense weights for backward, in eager mode.

Autograd saves the weight of every linear layer until its backward: with unpacked weights that is the whole
dense model. Under these hooks a saved tensor that is an unpacked weight (or a view of one, or autocast's
low-precision copy of one) is replaced by a recipe, and unpacked again in backward.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from smet_compile.ops.compact_weight import CompactWeight

_RECIPE = "smet.recipe"


class _Entered(NamedTuple):
    """One forward under way: the module, the frame that calls it, and its hooks where it installed some."""

    module: nn.Module
    frame: FrameType
    hooks: _Hooks | None


class _Forward(threading.local):
    """The forwards under way in this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Entered] = []

    @property
    def hooks(self) -> _Hooks | None:
        return next((entered.hooks for entered in reversed(self.stack) if entered.hooks is not None), None)

    def leave(self) -> nn.Module:
        """Ends the innermost forward; returns its module."""
        entered = self.stack.pop()
        if entered.hooks is not None:
            entered.hooks.context.__exit__(None, None, None)
        return entered.module

    def leave_interrupted(self, frame: FrameType | None) -> None:
        """Ends forwards that a KeyboardInterrupt broke off: torch calls no hook then, but their frames are gone."""
        if not self.stack:
            return
        running = set()
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        while self.stack and id(self.stack[-1].frame) not in running:
            self.leave()


_forward = _Forward()


@dataclass(frozen=True)
class _Recipe:
    """How to make an unpacked weight again."""

    compact: CompactWeight
    values: Tensor
    versions: tuple[int, int]

    @classmethod
    def of(cls, compact: CompactWeight, values: Tensor) -> _Recipe:
        return cls(compact, values, (values._version, compact.topology._version))

    def dense(self) -> Tensor:
        if self.versions != (self.values._version, self.compact.topology._version):
            raise RuntimeError(
                "a compact weight was changed between its forward and its backward; call backward() before "
                "optimizer.step() and TopologyManager.step()"
            )
        with torch.no_grad():
            compact = self.compact
            return torch.ops.smet.unpack(self.values, compact.topology, compact.index, *compact.op_layout())


@dataclass(frozen=True)
class _Kept:
    """What autograd holds in place of a dense weight, or of a view or a converted copy of it."""

    recipe: _Recipe
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        return self.recipe.dense().to(self.dtype).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Saved:
    """Any other saved tensor. Autograd leaves the check for changes in place to whoever installs hooks."""

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


class _Hooks:
    """One forward's saved-tensor hooks and the dense weights alive in it, by storage."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[StorageWeakRef, int, _Recipe]] = {}
        self.context = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def remember(self, dense: Tensor, recipe: _Recipe) -> None:
        # The weak reference keeps the storage's address from being used again while the entry stands.
        storage = StorageWeakRef(dense.untyped_storage())
        self.live[storage.cdata] = (storage, dense._version, recipe)

    def recipe(self, tensor: Tensor) -> _Recipe | None:
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()._cdata
        if storage in self.live:
            _, version, recipe = self.live[storage]
            return recipe if tensor._version == version else None
        base = tensor._base if tensor._base is not None else tensor
        if base.grad_fn is None or base._version != 0 or base.grad_fn.name() != "ToCopyBackward0":
            return None
        source = base.grad_fn.next_functions[0][0]
        return None if source is None else _notes(source).get(_RECIPE)

    def pack(self, tensor: Tensor) -> _Saved | _Kept:
        recipe = self.recipe(tensor)
        if recipe is None:
            # Detached: the tensor itself would be a reference cycle where a function saves its output.
            return _Saved(tensor.detach(), tensor._version)
        return _Kept(recipe, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    @staticmethod
    def unpack(saved: _Saved | _Kept) -> Tensor:
        return saved.restore()


def _notes(node: Any) -> dict[str, Any]:
    """What is noted at a node of the autograd graph, by whoever likes."""
    notes: dict[str, Any] = node.metadata
    return notes


def remember(compact: CompactWeight, values: Tensor, dense: Tensor) -> None:
    """Notes that ``dense`` was unpacked from ``values``, if a forward is under way."""
    hooks = _forward.hooks
    if hooks is None or dense.is_inference():
        return
    recipe = _Recipe.of(compact, values)
    hooks.remember(dense, recipe)
    if dense.grad_fn is not None:
        _notes(dense.grad_fn)[_RECIPE] = recipe


def _wanted() -> bool:
    """Whether to install hooks: training, and nobody else's (checkpointing's, a user's) or ours in force."""
    autograd: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and autograd._saved_tensors_hooks_is_enabled()
        and autograd._top_saved_tensors_default_hooks(False) is None
    )


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    caller = sys._getframe(1)
    _forward.leave_interrupted(caller)
    hooks = _Hooks() if _wanted() else None
    if hooks is not None:
        hooks.context.__enter__()
    _forward.stack.append(_Entered(module, caller, hooks))


def _exit(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or not any(module is entered.module for entered in _forward.stack):
        return
    while _forward.leave() is not module:
        pass


def install(module: nn.Module) -> None:
    """Runs the forwards of ``module`` under the hooks. Twice is the same as once."""
    if _enter not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_enter, prepend=True)
        module.register_forward_hook(_exit, always_call=True)


def uninstall(module: nn.Module) -> None:
    """Takes back ``install``."""
    for hooks, ours in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _exit)):
        for key in [k for k, hook in hooks.items() if hook is ours]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
