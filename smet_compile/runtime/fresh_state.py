"""Asks an optimizer what state it makes for a new weight: the state that newly grown weights get.

A newly grown weight is zero and has no gradient yet. So a second optimizer of the same class and options gets one
weight that is zero, and makes one step with a gradient of zero. Each state counts as it was when first written: Rprop's
step size is the learning rate, Adagrad's sum the initial accumulator, Lookahead's slow weight is zero as the weight.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from smet_compile.ops.optimizers import FoundOptimizer, attributes, inner_optimizers, is_hooks, is_optimizer_like

_MOST_STEPS = 100
"""Some wrappers write a state only in every k-th step."""


class FreshState:
    """Answers for one topology update, since options such as the learning rate may change until the next."""

    def __init__(self, optimizers: list[FoundOptimizer]) -> None:
        self._optimizers = optimizers
        self._questions: dict[Any, _Question] = {}

    def of(self, optimizer: Any, values: nn.Parameter, key: str) -> float | None:
        """Returns the number that fills the state ``key`` of a new weight; None where the optimizer cannot be asked.

        Wrappers are asked last: what they wrap mostly answers for itself.
        """
        holders = [each.optimizer for each in self._optimizers if id(values) in each.holds]
        for num_steps in (1, _MOST_STEPS):
            for asked in reversed(holders):
                question = self._question(asked, values)
                owner = question.optimizer if asked is optimizer else optimizer
                answer = question.answer((id(owner), key), num_steps)
                if answer is not None:
                    return answer
        return None

    def _question(self, asked: Any, values: nn.Parameter) -> _Question:
        topic = _kind_of(asked, values), values.dtype, values.device, values.dim()
        if topic not in self._questions:
            self._questions[topic] = _Question(asked, values)
        return self._questions[topic]


def _kind_of(optimizer: Any, values: nn.Parameter) -> Any:
    """Returns a key that is equal for optimizers that answer alike, so that of one per layer only one is asked.

    A class that is not torch's may know more than its options, so each such optimizer has a key of its own.
    """
    group = _group_of(optimizer, values)
    if not type(optimizer).__module__.startswith("torch.optim."):
        return id(optimizer), id(group)
    options = {} if group is None else {key: option for key, option in group.items() if key != "params"}
    return type(optimizer), tuple(
        (k, id(each) if isinstance(each, Tensor) else repr(each)) for k, each in options.items()
    )


class _Question:
    """Steps a second ``optimizer`` until it has written the state that is asked for."""

    def __init__(self, optimizer: Any, values: nn.Parameter) -> None:
        self.optimizer = optimizer
        self._twins = _Twins(values)
        with self._separate_random_numbers():
            self._twin = self._twins.of(optimizer)
        self._num_steps = 0
        self._can_step = _group_of(self._twin, self._twins.weight) is not None

    def answer(self, key: tuple[int, str], num_steps: int) -> float | None:
        known = self._twins.first_written()
        with self._separate_random_numbers():
            while key not in known and self._can_step and self._num_steps < num_steps:
                self._num_steps += 1
                self._can_step = _step(self._twin, self._twins.weight)
                known = self._twins.first_written()
        return known.get(key)

    def _separate_random_numbers(self) -> Any:
        device = self._twins.weight.device
        others = [device] if device.type in ("cuda", "xpu") else []
        return torch.random.fork_rng(others, device_type=device.type if others else "cuda")


def _group_of(optimizer: Any, values: Tensor) -> dict[str, Any] | None:
    groups = getattr(optimizer, "param_groups", None) or []
    return next((group for group in groups if any(p is values for p in group["params"])), None)


def _step(twin: Any, weight: nn.Parameter) -> bool:
    """Makes the twin step by its class's own methods, without hooks; returns whether it could.

    An optimizer of two steps (SAM) wants a closure, or has ``first_step`` and ``second_step``.
    """

    def closure() -> Tensor:
        weight.grad = torch.zeros_like(weight)
        return torch.zeros((), device=weight.device)

    for calls in ((("step", closure),), (("step",),), (("first_step",), ("second_step",))):
        try:
            for name, *arguments in calls:
                closure()
                _method(twin, name)(twin, *arguments)
        except Exception:  # whatever it fails with: it cannot be asked in this way
            continue
        return True
    return False


def _method(twin: Any, name: str) -> Any:
    method = getattr(type(twin), name)
    return method.__wrapped__ if getattr(method, "hooked", False) else method


class _Twins:
    """Makes second optimizers, each for one weight in place of the parameter ``values``."""

    def __init__(self, values: nn.Parameter) -> None:
        self._values = values
        shape, device = (1,) * values.dim(), "cpu" if values.is_meta else values.device  # its state is read
        self.weight = nn.Parameter(torch.zeros(shape, dtype=values.dtype, device=device))
        self._twins: dict[int, Any] = {id(values): self.weight}
        self._states: dict[int, _States] = {}

    def first_written(self) -> dict[tuple[int, str], float]:
        found = {}
        for owner, states in self._states.items():
            for key, state in states.first.get(self.weight, {}).items():
                if isinstance(state, Tensor) and state.shape == self.weight.shape:
                    found[owner, key] = state.item()
        return found

    def of(self, optimizer: Any) -> Any:
        """Returns the twin of an optimizer: made by its class from the options of the group, else copied."""
        if id(optimizer) not in self._twins:
            group = _group_of(optimizer, self._values)
            try:
                self._twins[id(optimizer)] = self._made(optimizer, group)
            except Exception:  # its constructor wants more than options: a wrapper's the wrapped, for one
                self._copy_attributes(optimizer)
        return self._twins[id(optimizer)]

    def _made(self, optimizer: Any, group: dict[str, Any] | None) -> Any:
        if group is None:
            raise ValueError
        options = {key: _copy(option) for key, option in group.items() if key != "params"}
        if "differentiable" in options:
            options["differentiable"] = False  # the state is the same, and a recorded step of a leaf fails
        # One that moves its own state is not asked: inside a wrapper, anything that steps stands for it.
        kind = SGD if hasattr(optimizer, "on_topology_change") else type(optimizer)
        accepted = inspect.signature(kind).parameters
        new_group = {"params": [self.weight]}
        twin = kind([new_group], **{key: each for key, each in options.items() if key in accepted})
        if _group_of(twin, self.weight) is None:
            raise ValueError
        for key, option in options.items():
            twin.param_groups[0][key] = option
        states = self._watch(optimizer)
        states.update_all(twin.state)
        twin.state = states
        self._twins[id(group)], self._twins[id(optimizer.param_groups)] = twin.param_groups[0], twin.param_groups
        return twin

    def _watch(self, optimizer: Any) -> _States:
        states = self._states[id(optimizer)] = _States()
        self._twins[id(getattr(optimizer, "state", states))] = states
        return states

    def _copy_attributes(self, optimizer: Any) -> None:
        """Copies what is small and plain; a twin that needs more than that fails in its step, and is not asked."""
        twin = self._twins[id(optimizer)] = object.__new__(type(optimizer))
        for _, inner in inner_optimizers(optimizer):
            self.of(inner)
        for name, value in attributes(optimizer):
            if is_hooks(name):
                copied: Any = OrderedDict()
            elif name == "state":
                copied = self._twins[id(value)] if id(value) in self._twins else self._watch(optimizer)
            else:
                copied = self._copied(value)
            if name != "step" and copied is not _LEFT_OUT:
                object.__setattr__(twin, name, copied)

    def _copied(self, value: Any) -> Any:
        if id(value) in self._twins:
            return self._twins[id(value)]
        if is_optimizer_like(value):
            return self.of(value)
        if isinstance(value, Tensor):
            return value.detach().clone() if value.numel() <= 1 and not isinstance(value, nn.Parameter) else _LEFT_OUT
        if isinstance(value, FunctionType):
            return value if value.__closure__ is None else _LEFT_OUT
        if isinstance(value, list | tuple):
            copies = self._all(value)
            return copies if isinstance(value, list) else tuple(copies)
        if isinstance(value, dict):
            keys = {key: self._copied(key) for key in value}
            pairs = {keys[key]: self._copied(each) for key, each in value.items() if keys[key] is not _LEFT_OUT}
            return {key: each for key, each in pairs.items() if each is not _LEFT_OUT}
        return value if isinstance(value, _PLAIN) else _LEFT_OUT

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [copied for copied in map(self._copied, values) if copied is not _LEFT_OUT]


class _States(defaultdict[Any, Any]):
    """Stands for an optimizer's ``state``, and remembers each entry as it was when first written."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[Any, dict[str, Any]] = {}

    def __missing__(self, parameter: Any) -> Any:
        self[parameter] = {}
        return self[parameter]

    def __setitem__(self, parameter: Any, state: Any) -> None:
        if isinstance(state, Mapping):
            state = _State(self.first.setdefault(parameter, {}), state)
        super().__setitem__(parameter, state)

    def update_all(self, states: Mapping[Any, Any]) -> None:
        for parameter, state in states.items():
            self[parameter] = state


class _State(dict[str, Any]):
    """Stands for the state of one parameter, and remembers the first value of each key in ``first``."""

    def __init__(self, first: dict[str, Any], state: Mapping[str, Any]) -> None:
        super().__init__()
        self._first = first
        self.update(state)

    def __setitem__(self, key: str, value: Any) -> None:
        if value is not None and key not in self._first:
            self._first[key] = _copy(value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *others: Any, **entries: Any) -> None:
        for key, value in dict(*others, **entries).items():
            self[key] = value


_LEFT_OUT: Any = object()
_PLAIN = (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, type(None))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
