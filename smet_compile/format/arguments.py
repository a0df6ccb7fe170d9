"""Checks the arguments that a user passes: numbers, flags, names, models. A check returns the value as plain Python.

NumPy scalars and 0-d arrays or tensors count as the number they hold. They are converted when an object is made, so
that everything that keeps the number, a checkpoint say, can store it. All errors are ``ValueError``.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

_LONGEST = 60
_LONGEST_NAME = 255
LARGEST = 2**63 - 1
_Called = TypeVar("_Called", bound=Callable[..., Any])


def whole_number(
    name: str, value: object, *, at_least: int | None = None, at_most: int = LARGEST, advice: str = "pass an int"
) -> int:
    """Returns ``value`` as an int in the range. A bool, a float (2.0 too) and a string are refused."""
    plain = _plain(value)
    try:
        found = None if isinstance(plain, bool | Tensor) else int(operator.index(plain))  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or (at_least is not None and found < at_least) or found > at_most:
        shown = at_most if found is not None and found > at_most else None
        expected = f"a whole number{_range_text(at_least, None, shown, None)}"
        raise ValueError(f"{name}: expected {expected}, got {described(value)}; {advice}")
    return found


def number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    advice: str = "pass a float",
) -> float:
    """Returns ``value`` as a finite float in the range. A bool, a string and a complex number are refused."""
    plain = _plain(value)
    try:
        real = isinstance(plain, numbers.Real) and not isinstance(plain, bool)
        found = float(plain) if real else math.nan  # type: ignore[arg-type]
    except (OverflowError, ValueError):
        found = math.nan
    inside = (
        math.isfinite(found)
        and (at_least is None or found >= at_least)
        and (above is None or found > above)
        and (at_most is None or found <= at_most)
        and (below is None or found < below)
    )
    if not inside:
        expected = f"number{_range_text(at_least, above, at_most, below)}"
        finite = "a " if (at_most if at_most is not None else below) is not None else "a finite "
        raise ValueError(f"{name}: expected {finite}{expected}, got {described(value)}; {advice}")
    return found


def seed_number(name: str, value: object) -> int:
    """Returns a seed as an int that ``torch.Generator.manual_seed`` takes."""
    return whole_number(name, value, at_least=-(2**63), at_most=2**64 - 1)


def flag(name: str, value: object) -> bool:
    """Returns ``value``, which is True or False; 0 and 1 are refused."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name}: expected True or False, got {described(value)}; pass a bool")
    return plain


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """Returns ``value``, which is one of the ``known`` strings."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {described(value)}; pass one of these names")
    return value


def module(name: str, value: object) -> nn.Module:
    """Returns ``value``, which is a model."""
    if not isinstance(value, nn.Module):
        raise ValueError(f"{name}: expected a model (torch.nn.Module), got {described(value)}; pass the model itself")
    return value


def optimizer(name: str, value: object) -> Any:
    """Returns ``value``, which has the parameter groups and the state of an optimizer."""
    if not (hasattr(value, "param_groups") and hasattr(value, "state")):
        advice = "pass what holds the model's parameters, such as ActiveAdamW(model)"
        raise ValueError(f"{name}: expected an optimizer (torch.optim.Optimizer), got {described(value)}; {advice}")
    return value


def path(name: str, value: object) -> str:
    """Returns the path of a file as text, each part of it a name that file systems take."""
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(found, str) or not found or "\0" in found:
        raise ValueError(f"{name}: expected the path of a file, got {described(value)}; pass a str or a pathlib.Path")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in found.split(os.sep)):
        raise ValueError(f"{name}: expected names of at most {_LONGEST_NAME} bytes, got {described(value)}; shorten it")
    return found


def function(name: str, value: _Called, signature: str) -> _Called:
    """Returns ``value``, which can be called; ``signature`` says how."""
    if not callable(value):
        raise ValueError(f"{name}: expected a function {signature}, got {described(value)}; pass a function")
    return value


def qualified_name(function: Callable[..., Any]) -> str:
    """Returns the name by which a checkpoint keeps a function that a user passed, or the class of a callable object."""
    kind: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


def described(value: object) -> str:
    """Returns a short text for an error message. Never raises."""
    try:
        if isinstance(value, Tensor):
            content = f" holding {value.item()!r}" if value.dim() == 0 and value.device.type == "cpu" else ""
            return f"a tensor of shape {tuple(value.shape)} and {value.dtype}{content}"
        if isinstance(value, nn.Module):
            return f"a module of class {type(value).__name__}"
        if isinstance(value, int) and value.bit_length() > 256:
            return f"an int of {value.bit_length()} bits"
        text = repr(value)
    except Exception:
        return f"an object of class {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _plain(value: object) -> object:
    """Returns the Python number in a NumPy scalar or in a 0-d array or tensor; any other ``value`` as it is."""
    if isinstance(value, bool | int | float | str):
        return value
    try:
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            return value.item()
    except Exception:  # a tensor without data
        return None
    return value


def _range_text(at_least: float | None, above: float | None, at_most: float | None, below: float | None) -> str:
    low = at_least if at_least is not None else above
    high = at_most if at_most is not None else below
    if low is None and high is None:
        return ""
    if high is None:
        return f" of at least {low}" if at_least is not None else f" above {low}"
    if low is None:
        return f" of at most {high}" if at_most is not None else f" below {high}"
    return f" in {'[' if at_least is not None else '('}{low}, {high}{']' if at_most is not None else ')'}"
