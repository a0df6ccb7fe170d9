"""Finds the optimizers that hold a model's parameters, inside whatever wraps them.

A user may pass a wrapper (Accelerate's, Lookahead, SAM, ZeRO, one optimizer per layer). Its state is not that of the
optimizer which updates a weight. The search follows attributes and containers, by their content and not by their name.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.ops import following
from smet_compile.shards import is_nonzero

_OWN = frozenset({"state", "param_groups", "defaults", "step"})
"""Attributes that are not searched: ``step`` may be patched by a wrapper, and lead back to it."""
_MAX_DEPTH = 5


@dataclass(frozen=True, eq=False)
class FoundOptimizer:
    """Describes an optimizer that holds some of the parameters that were searched for.

    Args:
        optimizer: the object; it has ``param_groups``.
        name: the class of the outermost object, and the attributes that lead from there to the optimizer.
        holds: ids of the parameters in its groups.
        steps: ids of those that it updates itself, because no optimizer inside it holds them.
    """

    optimizer: Any
    name: str
    holds: frozenset[int]
    steps: frozenset[int]

    def state_of(self, parameter: nn.Parameter) -> Any:
        """Returns what the optimizer keeps for ``parameter``; empty where it keeps nothing."""
        state = getattr(self.optimizer, "state", None)
        return state.get(parameter, {}) if isinstance(state, Mapping) else {}


def find_optimizers(given: Any, parameters: Iterable[nn.Parameter]) -> list[FoundOptimizer]:
    """Returns every optimizer in ``given`` that holds one of ``parameters``, wrappers before what they wrap.

    Args:
        given: an optimizer, a wrapper of one, or several in a list, tuple or dict.
    """
    search = _Search()
    for name, thing in _roots(given):
        search.visit(thing, name)
    return search.found({id(parameter) for parameter in parameters})


def optimizer_that_steps(given: Any, parameter: nn.Parameter) -> Any:
    """Returns the innermost optimizer in ``given`` that updates ``parameter``; None where there is none."""
    candidates = find_optimizers(given, [parameter])
    return next((candidate.optimizer for candidate in candidates if candidate.steps), None)


def unwrapped(optimizer: Any) -> Any:
    """Returns the optimizer inside wrappers that share its groups and its state, such as Accelerate's.

    A wrapper with groups or state of its own (Lookahead, SAM) is returned as it is.
    """
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        inside = (inner for _, inner in inner_optimizers(optimizer) if id(inner) not in seen)
        optimizer = next((inner for inner in inside if _share_everything(optimizer, inner)), optimizer)
    return optimizer


def state_holders(given: Any, parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Returns the optimizers in ``given`` whose state dicts together hold all state, wrappers before what they wrap.

    ``ZeroRedundancyOptimizer`` collects the state of its inner optimizer, which is therefore left out.
    """
    holders: list[Any] = []
    for found in find_optimizers(given, parameters):
        optimizer = unwrapped(found.optimizer)
        is_collected = any(_collects_state(holder) and _leads_to(holder, optimizer) for holder in holders)
        if not is_collected and all(optimizer is not holder for holder in holders):
            holders.append(optimizer)
    return holders or [unwrapped(given)]


def _collects_state(optimizer: Any) -> bool:
    return any(kind.__module__.startswith("torch.distributed.optim") for kind in type(optimizer).__mro__)


def _leads_to(outer: Any, inner: Any) -> bool:
    inside = [found for _, found in inner_optimizers(outer) if found is not outer]
    return any(found is inner or _leads_to(found, inner) for found in inside)


def inner_optimizers(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yields (attribute, object) for the attributes of ``thing`` that may be an optimizer or contain one."""
    for name, value in attributes(thing):
        if name not in _OWN and not is_hooks(name):
            yield from _reach(value, name, _MAX_DEPTH)


def attributes(thing: Any) -> list[tuple[str, Any]]:
    """Returns the attributes that ``thing`` itself stores, in its dict or in slots."""
    stored = list(getattr(thing, "__dict__", {}).items())
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(thing, slot):
                stored.append((slot, getattr(thing, slot)))
    return stored


def is_hooks(name: str) -> bool:
    """Tells whether the attribute of that name holds the hooks of a ``torch.optim.Optimizer``."""
    return name.startswith("_optimizer_") and name.endswith("_hooks")


def is_optimizer_like(thing: Any) -> bool:
    """Tells whether ``thing`` is an optimizer, or has parameter groups or a method ``step``, as a wrapper has."""
    if isinstance(thing, nn.Module | Tensor | type):
        return False
    if isinstance(thing, Optimizer) or callable(getattr(type(thing), "step", None)):
        return True
    return "param_groups" in getattr(thing, "__dict__", {}) or _answers_with_groups(thing)


def _answers_with_groups(thing: Any) -> bool:
    """Tells whether ``thing`` is a proxy that takes its attributes from an optimizer."""
    return hasattr(type(thing), "__getattr__") and hasattr(thing, "param_groups")


class _Search:
    """Walks from object to object, and records which objects were reached and what each of them contains."""

    def __init__(self) -> None:
        self._reached: dict[int, tuple[str, Any]] = {}
        self._inside: dict[int, list[int]] = {}

    def visit(self, thing: Any, name: str) -> None:
        if id(thing) in self._reached:
            return
        self._reached[id(thing)] = name, thing
        inner = list(inner_optimizers(thing))
        self._inside[id(thing)] = [id(each) for _, each in inner]
        for attribute, each in inner:
            self.visit(each, f"{name}.{attribute}")

    def found(self, wanted: set[int]) -> list[FoundOptimizer]:
        """Returns the optimizers that were reached and hold parameters with the ids ``wanted``."""
        holds = {key: _held_by(thing) & wanted for key, (_, thing) in self._reached.items()}
        leads_to = {key: self._leads_to(key) for key in holds}
        found = []
        for key, (name, thing) in self._reached.items():
            # An inner optimizer may refer to its wrapper, which is then not inside it.
            inside = (inner for inner in leads_to[key] if key not in leads_to[inner])
            steps = holds[key].difference(*(holds[inner] for inner in inside))
            if holds[key]:
                found.append(FoundOptimizer(thing, name, frozenset(holds[key]), frozenset(steps)))
        return found

    def _leads_to(self, key: int) -> set[int]:
        seen: set[int] = set()
        ahead = list(self._inside[key])
        while ahead:
            inner = ahead.pop()
            if inner not in seen:
                seen.add(inner)
                ahead += self._inside[inner]
        return seen


def _held_by(thing: Any) -> set[int]:
    """Returns the ids of the parameters in the groups of ``thing``."""
    groups = getattr(thing, "param_groups", None)
    if not isinstance(groups, Iterable):
        return set()
    return {id(p) for group in groups if isinstance(group, Mapping) for p in group.get("params", ())}


def _roots(given: Any) -> Iterator[tuple[str, Any]]:
    if is_optimizer_like(given) or not isinstance(given, Iterable) or isinstance(given, nn.Module | Tensor | str):
        yield type(given).__name__, given
        return
    for _, thing in _reach(given if isinstance(given, Mapping) else list(given), "", _MAX_DEPTH):
        yield type(thing).__name__, thing


def _reach(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yields the optimizers in a value with their names, through containers, bound methods and partial functions."""
    if isinstance(value, MethodType):
        value = value.__self__
    if is_optimizer_like(value):
        yield name, value
    elif depth and isinstance(value, functools.partial):
        yield from _reach([value.func, *value.args, *value.keywords.values()], name, depth - 1)
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _reach(item, f"{name}[{key!r}]" if isinstance(key, str | int) else f"{name}[...]", depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield from _reach(item, f"{name}[{index}]", depth - 1)


def _share_everything(outer: Any, inner: Any) -> bool:
    groups, state = getattr(outer, "param_groups", None), getattr(outer, "state", None)
    shared = groups is getattr(inner, "param_groups", None) and state is getattr(inner, "state", None)
    return shared and groups is not None and state is not None


_registered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_num_registered = itertools.count()


def register(optimizer: Any) -> None:
    """Lets ``registered_holders`` and ``siblings`` find an optimizer for as long as somebody keeps it."""
    _registered[next(_num_registered)] = optimizer
    following.watch(optimizer)


def registered_holders(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Returns the living registered optimizers that hold one of ``parameters``, in the order they were made in."""
    wanted = {id(parameter) for parameter in parameters}
    return [optimizer for _, optimizer in sorted(_registered.items()) if _held_by(optimizer) & wanted]


def siblings(found: list[FoundOptimizer], parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Returns the registered optimizers that train other ``parameters`` of the model than those in ``found`` do.

    There are none unless one in ``found`` is registered too. An optimizer that shares a parameter with ``found`` does
    not count: one of the two was made to replace the other.
    """
    registered = {id(each) for each in _registered.values()}
    if not any(id(each.optimizer) in registered for each in found):
        return []
    held = {parameter for each in found for parameter in _held_by(each.optimizer)}
    return [each for each in registered_holders(parameters) if not _held_by(each) & held]


def has_state(optimizer: Any) -> bool:
    """Tells whether the optimizer keeps state for any parameter."""
    state = getattr(optimizer, "state", None)
    return isinstance(state, Mapping) and any(bool(each) for each in state.values())


def changes_nothing(optimizer: Any) -> bool:
    """Tells whether every rate is 0 and every gradient is exactly zero.

    ``torch.distributed.checkpoint`` makes such a step to have an optimizer create its state. It is no step of the
    training. A warm-up that begins at rate 0 has gradients that are not zero.
    """
    if any(float(group.get("lr") or 0.0) != 0.0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(is_nonzero(gradient) for gradient in gradients)
