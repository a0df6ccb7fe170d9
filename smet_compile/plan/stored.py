"""What a training run stores between steps, and how many bytes that is: exactly, by kind."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import torch

from smet_compile.format import Layout, empty_lists
from smet_compile.ops.codes import num_scales

KINDS = ("weights", "gradients", "moments", "ages", "index", "buffers")
_COUNTS = 16
"""Of each trained parameter: its steps and its skipped blocks, int64."""
_BIRTHS = 256 * 8
"""Of each compact weight: when its generations were born."""
_TORCH_STEP = 4
_SCALE = 4
Bytes = dict[str, int]


@dataclass(frozen=True)
class Stored:
    """One parameter.

    Args:
        num_weights: of the dense parameter. layout, num_active: where it is compact, else None and 0.
        trained: whether a step gives it a gradient.
    """

    name: str
    num_weights: int
    dtype: torch.dtype
    layout: Layout | None = None
    num_active: int = 0
    trained: bool = True

    @property
    def num_values(self) -> int:
        """Entries of the tensor, what hangs over an edge among them."""
        return self.num_weights if self.layout is None else math.prod(self.layout.values_shape(self.num_active))

    @property
    def density(self) -> float:
        return 1.0 if self.layout is None else self.num_active / self.layout.num_blocks

    def dense(self) -> Stored:
        return replace(self, layout=None, num_active=0)


@dataclass(frozen=True)
class Recipe:
    """What decides bytes beside the weights.

    Args:
        state_dtype: of the moments: None (fp32), a dtype, or "int8".
        fused_update: no gradient of a compact weight outlives its update.
        by_torch: the optimizer is ``torch.optim.AdamW(fused=True)``, whose moments have the dtype of the weights.
    """

    state_dtype: torch.dtype | str | None = None
    fused_update: bool = True
    by_torch: bool = False

    def moment_dtype(self, weights: torch.dtype) -> torch.dtype:
        if self.by_torch or weights == torch.float64:
            return weights
        if isinstance(self.state_dtype, torch.dtype):
            return self.state_dtype
        return torch.uint8 if self.state_dtype == "int8" else torch.float32

    def scales_of(self, weights: torch.dtype) -> bool:
        return self.moment_dtype(weights) == torch.uint8


def bytes_of(parameter: Stored, recipe: Recipe) -> Bytes:
    """Bytes of one parameter by ``KINDS``."""
    count, size, layout = parameter.num_values, parameter.dtype.itemsize, parameter.layout
    found = dict.fromkeys(KINDS, 0) | {"weights": count * size}
    if layout is not None:
        lists = empty_lists(layout, parameter.num_active, torch.device("meta"))
        found["index"] = -(-layout.num_blocks // 8) + lists.nbytes
    if parameter.trained:
        kept = not (recipe.fused_update and layout is not None)
        found["gradients"] = count * size * kept
        scales = num_scales(parameter.num_weights, layout) if recipe.scales_of(parameter.dtype) else 0
        found["moments"] = 2 * count * recipe.moment_dtype(parameter.dtype).itemsize + 2 * scales * _SCALE
        found["ages"] = _ages(parameter, recipe)
    return found


def _ages(parameter: Stored, recipe: Recipe) -> int:
    if recipe.by_torch:
        return _TORCH_STEP
    return _COUNTS if parameter.layout is None else _COUNTS + _BIRTHS + parameter.num_active


def total_bytes(parameters: Iterable[Stored], recipe: Recipe, buffers: int = 0) -> Bytes:
    """Of a whole model. ``buffers``: bytes of what is neither trained nor ours."""
    total = dict.fromkeys(KINDS, 0) | {"buffers": buffers}
    for parameter in parameters:
        for kind, count in bytes_of(parameter, recipe).items():
            total[kind] += count
    return total


def resident_bytes(total: Bytes) -> int:
    """What lies in memory when a step begins: all but the gradients."""
    return sum(total.values()) - total["gradients"]


def values_bytes(parameters: Iterable[Stored], names: Container[str]) -> int:
    """Bytes of the values of the weights of these names."""
    return sum(each.num_values * each.dtype.itemsize for each in parameters if each.name in names)
