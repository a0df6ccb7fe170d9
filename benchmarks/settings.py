"""Defines how thoroughly and where to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

Size = TypeVar("Size")


@dataclass(frozen=True)
class Settings:
    """Holds the settings that every section is run with.

    Args:
        repeats: pairs of each measurement. quick: tiny sizes that prove nothing but that all runs.
        device: the CPU or a GPU.
    """

    repeats: int
    quick: bool
    device: torch.device

    def size(self, full: Size, quick: Size) -> Size:
        return quick if self.quick else full
