"""Has all ranks do something, or none of them: what one cannot do, the others hear of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import distributed

Result = TypeVar("Result")


def first_reason(reason: str, groups: Iterable[Any], device: Any) -> str:
    """Returns the reason of the first rank that has one, on all ranks of these groups; empty where none has.

    Args:
        reason: that of this rank; empty for none.
        groups: the process groups of a mesh, one for each dimension; None is the default one.
        device: the device on which they talk.
    """
    for group in groups:
        has_any = torch.tensor([bool(reason)], dtype=torch.uint8, device=device)
        distributed.all_reduce(has_any, distributed.ReduceOp.MAX, group=group)
        if has_any:
            reasons = [""] * distributed.get_world_size(group)
            distributed.all_gather_object(reasons, reason, group=group)
            reason = next(each for each in reasons if each)
    return reason


def together(work: Callable[[], Result], device: Any) -> Result:
    """Returns what ``work`` returns, once it is done on all ranks of the default process group; each has to call.

    Raises:
        ValueError: it failed on some; the same on every rank.
    """
    results: list[Result] = []
    error = None
    try:
        results.append(work())
    except Exception as caught:
        error = caught
    wrong = first_reason("" if error is None else _text(error), [None], device)
    if wrong:
        raise ValueError(f"{wrong}; the run is as it was") from error
    return results[0]


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"switch: {type(error).__name__}: {error}"
