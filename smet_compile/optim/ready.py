"""ReadyUpdate keeps a parameter's update from step to step, and tells whether it still holds.

An optimizer step of many parameters is short where each update is made once and then only gets its next gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smet_compile.ops.gate import GENERATIONS_OF_A_BYTE, check_ages
from smet_compile.ops.updates import Update
from smet_compile.optim.parameters import Parameter


class ReadyUpdate:
    """An update, and everything that it was made of.

    Args:
        update: made for ``known``. state: the optimizer's, of which its tensors are.
        options: those of the parameter group, but for its rate.
    """

    def __init__(self, update: Update, known: Parameter, state: dict[str, Any], options: tuple[Any, ...]) -> None:
        self.update = update
        self.known = known
        self.state = state
        self.options = options
        self.kept = tuple(state.items())
        self.tensors = (update.values, *(tensor for _, tensor in self.kept))
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        generation, births = update.generation, update.births
        self.looks_at_ages = (
            generation is not None
            and births is not None
            and (generation.dtype != torch.uint8 or births.numel() < GENERATIONS_OF_A_BYTE)
        )

    def with_gradient(
        self, grad: Tensor, state: dict[str, Any], options: tuple[Any, ...], rate: Tensor
    ) -> Update | None:
        """Returns the update with its next gradient and rate; None where anything else has changed."""
        update, known = self.update, self.known
        values = update.values
        site = known.site
        if site is not None and (site.values_maybe is not values or site.compact.active is not update.topology):
            return None
        if (
            state is not self.state
            or len(state) != len(self.kept)
            or values.shape != known.shape
            or grad.layout is not torch.strided
            or grad.numel() != values.numel()
            or options != self.options
        ):
            return None
        for key, tensor in self.kept:
            if state.get(key) is not tensor:
                return None
        if [tensor.data_ptr() for tensor in self.tensors] != self.addresses:
            return None
        if self.looks_at_ages:
            check_ages(known.name, update.generation, update.births, values.shape[0])
        update.grad, update.lr = grad, rate
        return update
