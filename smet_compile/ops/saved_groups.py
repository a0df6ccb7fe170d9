"""Checks the structure and the parameter groups of an optimizer's state dict before it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from smet_compile.ops.loaded import check_alike, kind_of

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class Saved(NamedTuple):
    """A parameter, and the group that it is in as it was saved."""

    parameter: nn.Parameter
    group: dict[str, Any]


def check_groups(state_dict: Any, optimizer: Optimizer, options: Collection[str]) -> dict[Hashable, Saved]:
    """Returns, by the number that stands for it, each parameter of ``optimizer`` and its saved group.

    Args:
        options: what every group must have.

    Raises ValueError where the groups hold other numbers of parameters, lack an option or have one of another kind.
    """
    for part, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get(part), kind):
            raise ValueError(
                f"optimizer: expected a state dict with a {kind.__name__} {part!r}, got {kind_of(state_dict)}"
            )
    groups, ours = state_dict["param_groups"], optimizer.param_groups
    if len(groups) != len(ours):
        raise ValueError(f"param_groups: expected {len(ours)} groups, got {len(groups)}; make the optimizer alike")
    saved: dict[Hashable, Saved] = {}
    for i, (group, our_group) in enumerate(zip(groups, ours, strict=True)):
        where = f"param_groups[{i}]"
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError(f"{where}: expected a dict with a list 'params', got {kind_of(group)}")
        if len(group["params"]) != len(our_group["params"]):
            raise ValueError(
                f"{where}: expected {len(our_group['params'])} parameters, got {len(group['params'])}; make the "
                "optimizer alike"
            )
        _check_group(where, group, our_group, options, type(optimizer).__name__)
        for number, parameter in zip(group["params"], our_group["params"], strict=True):
            if not isinstance(number, int | str) or isinstance(number, bool) or number in saved:
                raise ValueError(f"{where}.params: expected each parameter's number once, got {number!r:.80}")
            saved[number] = Saved(parameter, group)
    return saved


def _check_group(where: str, group: dict[str, Any], ours: dict[str, Any], options: Collection[str], owner: str) -> None:
    for option in sorted(options):
        if option not in group:
            raise ValueError(f"{where}: expected {option!r} in every group; load the state of {owner}")
    for option, value in group.items():
        if option in ("params", "param_names"):
            continue
        if option in ours:
            check_alike(f"{where}.{option}", value, ours[option])
        elif option in _RATES:
            check_alike(f"{where}.{option}", value, 0.0)
