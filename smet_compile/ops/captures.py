"""Tells whether a CUDA graph is being captured, and remembers which weights a captured graph updates.

A graph repeats launches with the addresses and numbers that they had at capture. What is copied from the host would be
read anew at each replay, from memory that holds something else by then, so it is refused. Memory that only this library
knows of has to live as long as the weight, and a weight that moves to new memory leaves the graph behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class _Graphs:
    """Holds what is known of the captured graphs that update one weight.

    Args:
        read: tensors that they read and nobody else may hold. are_current: whether weight and state lie where they did.
    """

    def __init__(self) -> None:
        self.read: list[Tensor] = []
        self.are_current = True


_graphs = WeakIdKeyDictionary()


def is_capturing(device: torch.device) -> bool:
    """Tells whether launches on the current stream of ``device`` are captured instead of made."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(device: torch.device, what: str) -> None:
    """Raises RuntimeError during a capture; ``what`` says what has to be done before it."""
    if is_capturing(device):
        raise RuntimeError(
            f"CUDA graph: expected {what} before the capture, got a step that would copy between host and device in "
            "it; make a step like it outside the capture first"
        )


def refuse_to_wait(device: torch.device, what: str, advice: str) -> None:
    """Raises RuntimeError during a capture, where the host reads numbers of the device each time."""
    if is_capturing(device):
        raise RuntimeError(f"CUDA graph: expected a step that reads nothing on the host, got {what}; {advice}")


def note(weights: Iterable[Tensor], read: Iterable[Tensor] = ()) -> None:
    """Notes that a captured graph updates ``weights``; the tensors ``read`` live as long as the first of these."""
    for number, weight in enumerate(weights):
        graphs = _graphs.setdefault(weight, _Graphs())
        graphs.are_current = True
        graphs.read.extend(read if number == 0 else ())


def warn_of_new_memory(weights: Iterable[Tensor]) -> None:
    """Warns where a captured graph updates one of ``weights``, since it or its state is about to get new memory."""
    left_behind = [graphs for graphs in map(_graphs.get, weights) if graphs is not None and graphs.are_current]
    for graphs in left_behind:
        graphs.are_current = False
    if left_behind:
        warnings.warn(
            f"a captured CUDA graph updates {len(left_behind)} weights that get new memory, for themselves or for "
            "their optimizer state (density stage, loaded state); do not replay it again, but capture a new one",
            stacklevel=3,
        )
