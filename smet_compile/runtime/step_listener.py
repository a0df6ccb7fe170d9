"""StepListener: hears each training step of one optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from smet_compile.ops.optimizers import FoundOptimizer, changes_nothing, has_state
from smet_compile.ops.outside_graphs import outside_graphs, prepare

_ADVICE = "a TopologyManager hears the optimizer's steps in eager mode; compile the step without fullgraph=True"


class StepListener:
    """Calls ``tell(optimizer)`` after each training step, as long as the object of that method is alive.

    Not a training step is one that a GradScaler's fused optimizer skipped, and one that only makes state
    (``torch.distributed.checkpoint``). A class whose ``step`` calls that of its parent has two pairs of hooks run in
    one step; the first one to end counts.

    Raises ValueError for an optimizer without step hooks.
    """

    def __init__(self, found: FoundOptimizer, tell: Callable[[Any], None]) -> None:
        self._tell = weakref.WeakMethod(tell)
        self._had_state = True
        self._has_begun = True
        try:
            found.optimizer.register_step_pre_hook(partial(_before, self))
            found.optimizer.register_step_post_hook(partial(_after, self))
        except AttributeError:
            raise ValueError(
                f"{found.name}: expected a torch.optim.Optimizer, whose steps can be counted, got a "
                f"{type(found.optimizer).__name__} without step hooks; derive it from torch.optim.Optimizer and call "
                "super().__init__(params, defaults)"
            ) from None
        prepare()


@outside_graphs(_ADVICE)
def _before(listener: StepListener, optimizer: Any, *_: Any) -> None:
    listener._has_begun = True
    listener._had_state = has_state(optimizer)


@outside_graphs(_ADVICE)
def _after(listener: StepListener, optimizer: Any, *_: Any) -> None:
    tell = listener._tell()
    if tell is None or not listener._has_begun:
        return
    listener._has_begun = False
    skipped = getattr(optimizer, "found_inf", None)
    if isinstance(skipped, Tensor) and bool(skipped):
        return
    if listener._had_state or not changes_nothing(optimizer):
        tell(optimizer)
