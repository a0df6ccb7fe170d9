"""How large the gradients of a step were, seen by its optimizer."""

from typing import Any

import torch
from torch import nn


class GradientBytes:
    """Bytes of each gradient that an optimizer's first step finds: none where an update was fused into backward."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._of: dict[nn.Parameter, int] = {}
        self._handle = optimizer.register_step_pre_hook(self._look)

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._handle.remove()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self._of = {p: p.grad.nbytes for p in held if p.grad is not None}

    def of(self, parameter: nn.Parameter) -> int:
        return self._of.get(parameter, 0)
