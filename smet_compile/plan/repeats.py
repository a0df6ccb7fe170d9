"""Layers that repeat: a model of many equal ones is planned from models of one and of two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Repeats(NamedTuple):
    """A list of layers that are equal from the first or from the second on.

    Args:
        name: of the list in the model. kept: how many of them stand for all. extra: how many there are more.
    """

    name: str
    kept: int
    extra: int


def find_repeats(model: nn.Module, kind_of: Callable[[str], Any] = lambda name: None) -> list[Repeats]:
    """The lists worth shortening. ``kind_of``: qualified name of a parameter → what else must be equal."""
    found: list[Repeats] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer.name + ".") for outer in found)
        if inside or not isinstance(module, nn.ModuleList) or len(module) < 4:
            continue
        kinds = [_kind(layer, f"{name}.{i}", kind_of) for i, layer in enumerate(module)]
        kept = 1 if kinds[0] == kinds[1] else 2
        if all(kind == kinds[kept] for kind in kinds[kept:]):
            found.append(Repeats(name, kept, len(module) - kept))
    return found


def _kind(layer: nn.Module, prefix: str, kind_of: Callable[[str], Any]) -> Any:
    modules = [(name, type(module).__name__) for name, module in layer.named_modules()]  # parametrized: a class each
    parameters = [
        (name, parameter.shape, parameter.dtype, parameter.requires_grad, kind_of(f"{prefix}.{name}"))
        for name, parameter in layer.named_parameters()
    ]
    return modules, parameters


def shortened(model: nn.Module, repeats: list[Repeats], longer: Repeats | None = None) -> nn.Module:
    """A copy with as many layers as stand for all, and one more in ``longer``. Tensors are shared with ``model``."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    lists = {repeat.name: model.get_submodule(repeat.name) for repeat in repeats}
    for repeat in repeats:
        dropped: Any = lists[repeat.name]
        for layer in dropped[repeat.kept + (repeat == longer) :]:
            shared |= {id(layer): None}
    short = copy.deepcopy(model, shared)
    for repeat in repeats:
        layers: Any = short.get_submodule(repeat.name)
        kept = list(layers)[: repeat.kept + (repeat == longer)]
        parent, _, name = repeat.name.rpartition(".")
        setattr(short.get_submodule(parent), name, nn.ModuleList(kept))
    return short
