"""The steps of an optimizer: when it made one, which parameters it trained, whether their gradients were finite."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import captures
from smet_compile.ops.optimizers import FoundOptimizer, changes_nothing, has_state
from smet_compile.ops.sinks import UpdateCounts, counts_of
from smet_compile.ops.torch_insides import outside_graphs, prepare, warn_once
from smet_compile.runtime.interrupts import waiting_interrupts
from smet_compile.shards import local

_ADVICE = "a TopologyManager hears the optimizer's steps in eager mode; compile the step without fullgraph=True"
_CAPTURED = (
    "TopologyManager: optimizer.step() was captured in a CUDA graph, whose replays run no hooks, so the manager does "
    "not count them and changes no topology; leave optimizer.step() outside of the graph, or compile the step by "
    'compile_train_step and step.compile(mode="reduce-overhead")'
)


class StepListener:
    """Calls ``callback(optimizer)`` after each training step, as long as the object of that method is alive.

    With ``keeps_alive`` the optimizer keeps that object alive.

    A step that a GradScaler's fused optimizer skipped is no training step, nor is one that only makes state
    (``torch.distributed.checkpoint``). A class whose ``step`` calls that of its parent has two pairs of hooks run in
    one step; the first one to end counts.

    Raises ValueError for an optimizer without step hooks.
    """

    def __init__(self, found: FoundOptimizer, callback: Callable[[Any], None], keeps_alive: bool = False) -> None:
        self._callback: Callable[[], Callable[[Any], None] | None]
        self._callback = (lambda: callback) if keeps_alive else weakref.WeakMethod(callback)
        self._had_state = True
        self._has_begun = True
        try:
            found.optimizer.register_step_pre_hook(partial(_before_step, self))
            found.optimizer.register_step_post_hook(partial(_after_step, self))
        except AttributeError:
            raise ValueError(
                f"{found.name}: expected a torch.optim.Optimizer, whose steps can be counted, got a "
                f"{type(found.optimizer).__name__} without step hooks; derive it from torch.optim.Optimizer and call "
                "super().__init__(params, defaults)"
            ) from None
        prepare()

    def stop(self) -> None:
        """Calls and keeps alive nothing from now on."""
        self._callback = lambda: None


@outside_graphs(_ADVICE)
def _before_step(listener: StepListener, optimizer: Any, *_: Any) -> None:
    listener._has_begun = True
    listener._had_state = has_state(optimizer)


@outside_graphs(_ADVICE)
def _after_step(listener: StepListener, optimizer: Any, *_: Any) -> None:
    callback = listener._callback()
    if callback is None or not listener._has_begun:
        return
    listener._has_begun = False
    if _is_captured(optimizer):
        warn_once(_CAPTURED)
        return
    skipped = getattr(optimizer, "found_inf", None)
    if isinstance(skipped, Tensor) and bool(skipped):
        return
    if listener._had_state or not changes_nothing(optimizer):
        with waiting_interrupts():
            callback(optimizer)


def _is_captured(optimizer: Any) -> bool:
    """Tells whether the step went into a CUDA graph, and was not made."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return any(captures.is_capturing(device) for device in {p.device for p in parameters})


_Counts = dict[nn.Parameter, UpdateCounts]
_Numbers = dict[nn.Parameter, tuple[int, int]]
"""The numbers of updates and of skipped blocks."""
_Known = dict[nn.Parameter, tuple[UpdateCounts, tuple[int, int]]]
"""Numbers that were read, and the tensors that they were read from."""


class TrainedParameters:
    """Holds which parameters were trained since the last update, and which had a bad gradient in the last step.

    It sees a step from within the optimizer's hook, while its gradients are there. Whether they are finite it asks in
    steps alone that an update may follow, since that waits for the device. A gradient that an update in backward
    consumed is there no more; what is left are the counts of such updates, which are read before and after such a step.
    """

    def __init__(self) -> None:
        self._optimizers: list[Any] = []
        self._before: _Known = {}
        self._last: _Known = {}
        self._at_update: _Known = {}
        self._trained: dict[int, set[int]] = {}
        self._is_trainable: dict[int, bool] = {}
        self._not_finite: dict[int, list[nn.Parameter]] = {}

    def __contains__(self, parameter: nn.Parameter) -> bool:
        """Tells whether it was trained, and was not frozen when its own optimizer made its last step.

        Others may step while it is frozen: the discriminator of a GAN is in the step of the generator.
        """
        is_trainable = self._is_trainable.get(id(parameter), parameter.requires_grad)
        return is_trainable and any(id(parameter) in trained for trained in self._trained.values())

    @property
    def ids(self) -> set[int]:
        """Returns the ids of the trained parameters; waits for the device where updates are made in backward."""
        counts = self._counts()
        return {id(p) for p in self._updated(counts, _read_counts(counts))}.union(*self._trained.values())

    @property
    def not_finite(self) -> list[nn.Parameter]:
        """Returns the trained parameters whose gradient was not finite."""
        return [p for each in self._not_finite.values() for p in each]

    def set_optimizers(self, optimizers: list[Any]) -> None:
        """Sets the optimizers that may count updates made in backward."""
        self._optimizers = optimizers

    def read_counts(self) -> None:
        """Reads the counts; called before a step that will be looked at."""
        counts = self._counts()
        self._before = _with_counts(counts, _read_counts(counts))

    def note_step(self, optimizer: Any) -> None:
        """Notes what a step trained that is not looked at, as far as gradients are there."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._is_trainable.update((id(p), p.requires_grad) for p in parameters)
        self._trained.setdefault(id(optimizer), set()).update(id(p) for p in parameters if p.grad is not None)

    def look_at_step(self, optimizer: Any) -> None:
        """Finds out what ``optimizer`` trained; called after its step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._is_trainable.update((id(p), p.requires_grad) for p in parameters)
        all_counts = self._counts()
        counts = {p: all_counts[p] for p in parameters if p in all_counts}
        now, before = _read_counts(counts), _numbers_of(self._before, counts)
        self._last |= _with_counts(counts, now)
        with_gradient = [p for p in parameters if p.grad is not None]
        not_finite = {id(p) for p in counts if now[p][1] > before[p][1]} | _with_broken_gradient(with_gradient)
        trained = [*with_gradient, *self._updated(counts, now)]
        self.set_step(optimizer, trained, [p for p in parameters if id(p) in not_finite])

    def set_step(self, optimizer: Any, trained: list[nn.Parameter], not_finite: list[nn.Parameter]) -> None:
        """Notes what ``optimizer`` trained by now, and the gradients that were not finite in its last step."""
        self._trained.setdefault(id(optimizer), set()).update(id(p) for p in trained)
        self._not_finite[id(optimizer)] = not_finite

    def forget(self) -> None:
        """Forgets all steps; called after an update, for which parameters have to be trained anew."""
        self._trained, self._is_trainable, self._not_finite, self._at_update = {}, {}, {}, dict(self._last)

    def start_anew(self) -> None:
        """Forgets all steps that were made by now, be they looked at or not; called before a state is loaded."""
        counts = self._counts()
        self._last = _with_counts(counts, _read_counts(counts))
        self.forget()

    def _counts(self) -> _Counts:
        return {p: counts for optimizer in self._optimizers for p, counts in counts_of(optimizer).items()}

    def _updated(self, counts: _Counts, now: _Numbers) -> list[nn.Parameter]:
        """Returns the parameters that were updated in backward since the last update of topologies."""
        then = _numbers_of(self._at_update, counts)
        return [p for p in counts if now[p][0] > then[p][0]]


def _with_counts(counts: _Counts, numbers: _Numbers) -> _Known:
    return {p: (counts[p], numbers[p]) for p in numbers}


def _numbers_of(known: _Known, counts: _Counts) -> _Numbers:
    """Returns the numbers that are known of these counts, and the first ones of counts that are new."""
    old = {p: known[p][1] for p, each in counts.items() if p in known and known[p][0] is each}
    new = [p for p in counts if p not in old]
    updates = read_scalars([counts[p].first_updates for p in new])
    skipped = read_scalars([counts[p].first_skipped for p in new])
    return old | dict(zip(new, zip(updates, skipped, strict=True), strict=True))


def _with_broken_gradient(parameters: list[nn.Parameter]) -> set[int]:
    """Returns the ids of the parameters whose gradient, the part that this rank holds, is not finite."""
    grads = {id(p): local(p.grad) for p in parameters if p.grad is not None}
    are_finite = read_scalars([grad.isfinite().all() for grad in grads.values()])
    return {key for key, is_finite in zip(grads, are_finite, strict=True) if not is_finite}


def _read_counts(counts: _Counts) -> _Numbers:
    """Returns the number of updates and of skipped blocks of each parameter."""
    updates = read_scalars([each.num_updates for each in counts.values()])
    skipped = read_scalars([each.num_skipped for each in counts.values()])
    return dict(zip(counts, zip(updates, skipped, strict=True), strict=True))


def read_scalars(scalars: list[Tensor]) -> list[Any]:
    """Copies scalars of one dtype to the host, and waits for each device once, unless they are subclasses."""
    plain: dict[torch.device, list[Tensor]] = {}
    for scalar in scalars:
        if type(scalar) is Tensor:
            plain.setdefault(scalar.device, []).append(scalar)
    numbers = {device: iter(torch.stack(some).tolist()) for device, some in plain.items()}
    return [next(numbers[each.device]) if type(each) is Tensor else each.item() for each in scalars]
