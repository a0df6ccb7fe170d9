"""The usual two parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from smet_compile.format import arguments
from smet_compile.ops import find_sites


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not. A compact weight is a matrix, whatever the shape of its values.

    Returns: two parameter groups, for ``ActiveAdamW(groups, model=model)`` or any optimizer.

    Raises:
        ValueError: no model, or a weight decay that is no finite number of at least 0.
    """
    arguments.module("decay_groups", model)
    weight_decay = arguments.number("weight_decay", weight_decay, at_least=0)
    compact = {id(site.values) for site in find_sites(model).values()}
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = id(parameter) in compact or parameter.dim() >= 2
        (decay if is_matrix else plain).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
