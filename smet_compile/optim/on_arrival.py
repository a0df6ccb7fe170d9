"""Updates each parameter of a sharded model in backward, as soon as its gradient has been reduced over the ranks.

FSDP2 reduces the gradients of one module at a time and then runs the hooks of its parameters. A gradient that is used
there and freed is never in memory together with those of other modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smet_compile.ops.sinks import count_by
from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.parameters import make_updates


class UpdatesOnArrival:
    """Makes the updates of an optimizer in the hooks of its parameters, while ``active()`` lasts.

    Args:
        optimizer: holds parameters that are sharded. Those that have a gradient afterwards are left to its ``step()``.
    """

    def __init__(self, optimizer: ActiveOptimizer) -> None:
        self._optimizer = optimizer
        self._groups: dict[nn.Parameter, dict[str, Any]] | None = None
        this = weakref.ref(self)

        def hook(parameter: nn.Parameter) -> None:
            updates = this()
            if updates is not None and updates._groups is not None:
                updates._update(parameter, updates._groups[parameter])

        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Has gradients that come in the block be used and freed at once."""
        self._groups = {parameter: group for group in self._optimizer.param_groups for parameter in group["params"]}
        try:
            yield
        finally:
            self._groups = None

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        self._optimizer.check_parameter(parameter)
        update = self._optimizer.update_of(parameter, group)
        count_by(self._optimizer, parameter, update.step, update.num_skipped)
        make_updates([update])
        parameter.grad = None
