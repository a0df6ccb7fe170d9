"""Holds the numbers of each parameter group as tensors: the rate on the device, so that a step copies none there.

A scheduler's new rate is written into the same tensor: it needs no new graph, and a CUDA graph reads it at each replay.
A number that is given while a graph is captured becomes part of the graph, as in the optimizers of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smet_compile.ops import captures


class Rates:
    """Holds the rates of one optimizer.

    They have the shape (1,), since Dynamo would specialise on the value of a 0-d float64 tensor first, and then compile
    again.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, float | None]] = {}

    def rate(self, group: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns the rate of a group. Raises RuntimeError where a graph is captured and the rate is on the host."""
        lr, key = group["lr"], (id(group["params"]), device, dtype)
        tensor, written = self._tensors.get(key, (None, None))
        if tensor is None:
            tensor = torch.empty(1, dtype=dtype, device=device)
        if isinstance(lr, Tensor) and lr.device.type != device.type:
            for each in (device, lr.device):
                captures.refuse_to_wait(each, f"lr on {lr.device}", f"pass a number, or a tensor on {device}")
        if isinstance(lr, Tensor) and (device.type == "cpu" or lr.device.type != "cpu"):
            self._tensors[key] = tensor.copy_(lr.detach()), None
            return tensor
        number = float(lr)
        if captures.is_capturing(device):
            return torch.full((1,), number, dtype=dtype, device=device)
        if number != written:
            self._tensors[key] = tensor.fill_(number), number
        return tensor


class Options:
    """Holds the other numbers of the groups of one optimizer, which its step reads on the CPU."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, list[float]]] = {}

    def tensor(self, group: dict[str, Any], numbers: list[float]) -> Tensor:
        """Returns the tensor of a group, with these numbers written into it."""
        key = id(group["params"])
        tensor, written = self._tensors.get(key, (None, None))
        if tensor is None:
            tensor = torch.empty(len(numbers), dtype=torch.float64)
        if numbers != written:
            self._tensors[key] = tensor.copy_(torch.tensor(numbers, dtype=torch.float64)), numbers
        return tensor
