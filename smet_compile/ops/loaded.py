"""Checks data that comes from a file: values, tensors, and the parameter groups of an optimizer's state dict.

Each check raises ValueError and names the value by its path.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MANAGER = "topology_manager"
"""The key in an optimizer's first parameter group under which the state of a topology manager travels."""
_LARGEST = 2**62
_LARGEST_OF: dict[type, float] = {int: _LARGEST, float: sys.float_info.max}


def check_keys(where: str, got: Any, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Checks that ``got`` is a dict with all ``required`` keys and no others than these and ``optional``."""
    if not isinstance(got, dict):
        raise ValueError(f"{where}: expected a dict, got {kind_of(got)}")
    for key in required:
        if key not in got:
            raise ValueError(f"{where}: expected {key!r} in it, found none; it is not whole")
    for key in got:
        if key not in required and key not in optional:
            raise ValueError(f"{where}: got {key!r}, which this version does not know; upgrade smet_compile")


def check_names(where: str, got: Any, names: Collection[str], is_whole: bool = False) -> None:
    """Checks that the keys of the dict ``got`` are ``names`` of weights or parameters; all of them if it is whole."""
    if not isinstance(got, dict):
        raise ValueError(f"{where}: expected a dict, got {kind_of(got)}")
    for name in got:
        if name not in names:
            raise ValueError(
                f"{where}: got {name!r}, which is no name in this model; load it into a model of the same layers, in "
                "wrappers that this version knows"
            )
    if is_whole:
        check_keys(where, got, names)


def check_integer(where: str, got: Any, smallest: int = 0, largest: int = _LARGEST) -> None:
    """Checks that ``got`` is an integer from ``smallest`` to ``largest``, and no bool."""
    if type(got) is not int or not smallest <= got <= largest:
        raise ValueError(f"{where}: expected an integer from {smallest} to {largest}, got {_shown(got)}")


def check_number(where: str, got: Any, smallest: float = -math.inf, largest: float = math.inf) -> None:
    """Checks that ``got`` is a finite number from ``smallest`` to ``largest``."""
    if type(got) not in (int, float) or not abs(got) <= _LARGEST_OF[type(got)] or not smallest <= got <= largest:
        raise ValueError(f"{where}: expected a finite number from {smallest} to {largest}, got {_shown(got)}")


def check_tensor(where: str, got: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Checks that ``got`` is a tensor with these dtype and shape."""
    if not isinstance(got, Tensor) or got.dtype != dtype or tuple(got.shape) != shape:
        raise ValueError(f"{where}: expected {dtype} of shape {shape}, got {kind_of(got)}")


def check_alike(where: str, got: Any, ours: Any) -> None:
    """Checks that the option ``got`` has the kind of ``ours``: a finite number for a number, and so on inside lists.

    A number may stand for a tensor without dimensions and the other way round. Where ``ours`` is None, a flag or a
    number passes too.
    """
    if isinstance(ours, bool):
        if got is not None and type(got) is not bool:
            raise ValueError(f"{where}: expected True or False, got {_shown(got)}")
    elif isinstance(ours, float) and math.isinf(ours) and type(got) is float and got == ours:
        return  # an option that means "no limit"
    elif isinstance(ours, int | float | Tensor):
        _check_number_or_tensor(where, got, ours)
    elif isinstance(ours, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(ours):
            raise ValueError(f"{where}: expected {len(ours)} values, got {_shown(got)}")
        for i, (value, our_value) in enumerate(zip(got, ours, strict=True)):
            check_alike(f"{where}[{i}]", value, our_value)
    elif ours is None:
        if not (got is None or type(got) in (bool, int, float)):
            raise ValueError(f"{where}: expected None, a flag or a number, got {_shown(got)}")
    elif type(got) is not type(ours):
        raise ValueError(f"{where}: expected {type(ours).__name__}, got {_shown(got)}")


def _check_number_or_tensor(where: str, got: Any, ours: Any) -> None:
    if isinstance(got, Tensor):
        shape = tuple(ours.shape) if isinstance(ours, Tensor) else ()
        if not got.is_floating_point() or tuple(got.shape) != shape or not bool(got.isfinite().all()):
            raise ValueError(f"{where}: expected finite floating-point numbers of shape {shape}, got {_shown(got)}")
    elif isinstance(ours, Tensor) and ours.dim() > 0:
        raise ValueError(f"{where}: expected a tensor of shape {tuple(ours.shape)}, got {_shown(got)}")
    else:
        check_number(where, plain_number(got))


def plain_number(value: Any) -> Any:
    """Returns the Python number or string that a numpy scalar holds exactly; everything else as it is."""
    if isinstance(value, np.bool_ | np.integer | np.floating | np.str_) and not isinstance(value, np.timedelta64):
        plain = value.item()
        return plain if type(plain) in (bool, int, float, str) else value
    return value


def kind_of(value: Any) -> str:
    """Describes a value's kind for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.item()!r}" if value.numel() == 1 else kind_of(value)
    text = f"{value!r}" if not (type(value) is int and abs(value) > 10**20) else "an integer beyond 64 bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class Saved(NamedTuple):
    """Holds a parameter of ours and the saved group that it belongs to."""

    parameter: nn.Parameter
    group: dict[str, Any]


def check_groups(state_dict: Any, optimizer: Optimizer, options: Collection[str]) -> dict[Hashable, Saved]:
    """Returns each parameter of ``optimizer`` and its saved group, by the parameter's number in ``state_dict``.

    Args:
        options: the options that every group must have.

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
        if option in ("params", "param_names", MANAGER):
            continue
        if option in ours:
            check_alike(f"{where}.{option}", value, ours[option])
        elif option in _RATES:
            check_alike(f"{where}.{option}", value, 0.0)
