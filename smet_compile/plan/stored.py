"""Counts the bytes that a training run stores between steps, exactly and by kind; reads and writes sizes as text."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import torch

from smet_compile.format import Layout, arguments, empty_lists
from smet_compile.ops.law import num_scales
from smet_compile.optim import OPTIMIZERS

KINDS = ("weights", "gradients", "moments", "ages", "index", "buffers")
SCALE_BYTES = 4
_COUNTS_BYTES = 16
"""A trained parameter counts its steps and its skipped blocks, int64 each."""
_BIRTHS_BYTES = 256 * 8
"""A compact weight keeps the steps at which its generations were born, int64 each."""
_TORCH_STEP_BYTES = 4
_PREFIXES = ("", "k", "M", "G", "T", "P")
_UNITS = {f"{prefix}b".lower(): 1000**power for power, prefix in enumerate(_PREFIXES)}
_UNITS |= {f"{prefix}ib".lower(): 1024**power for power, prefix in enumerate(_PREFIXES) if power}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
Bytes = dict[str, int]


@dataclass(frozen=True)
class Stored:
    """Describes one parameter.

    Args:
        num_weights: the number of entries of the dense parameter.
        layout, num_active: its layout and its active blocks where it is compact, else None and 0.
        trained: True where a step gives it a gradient.
        is_vector: True for a dense parameter of fewer than two dimensions.
        is_output_head: True for the weight that ``find_output_head`` returns.
        num_rows: the length of the first dimension of the dense parameter, along which FSDP2 cuts it.
        layer: the name of the repeated module that it belongs to; empty where it belongs to none.
        whole: the layout of the weight that all ranks of tensor parallelism have together, where this is the part of
            one of them; None where it is all of a parameter. All else is then that of the part.
    """

    name: str
    num_weights: int
    dtype: torch.dtype
    layout: Layout | None = None
    num_active: int = 0
    trained: bool = True
    is_vector: bool = False
    is_output_head: bool = False
    num_rows: int = 1
    layer: str = ""
    whole: Layout | None = None

    @property
    def num_values(self) -> int:
        """Returns the number of entries of the tensor; blocks that hang over an edge count in full."""
        return self.num_weights if self.layout is None else math.prod(self.layout.values_shape(self.num_active))

    @property
    def num_stored_rows(self) -> int:
        """Returns the length of the first dimension of the tensor: for a compact weight its active blocks."""
        return self.num_rows if self.layout is None else self.num_active

    @property
    def row_bytes(self) -> int:
        return self.row_values * self.dtype.itemsize

    @property
    def row_values(self) -> int:
        """Returns the number of entries of a row of the tensor."""
        return self.num_values // max(1, self.num_stored_rows)

    @property
    def density(self) -> float:
        return 1.0 if self.layout is None else self.num_active / self.layout.num_blocks

    @property
    def num_scales(self) -> int:
        """Returns the number of groups whose 8-bit codes share a scale; every rank has those of the whole weight."""
        return num_scales(self.num_weights, self.whole or self.layout)

    def dense(self) -> Stored:
        return replace(self, layout=None, num_active=0, whole=None)

    def part(self, dim: int, count: int) -> Stored:
        """Returns one of ``count`` equal parts along a dimension of the dense parameter."""
        layout = None if self.layout is None else self.layout.cut(dim, count)
        return replace(
            self,
            num_weights=self.num_weights // count,
            num_rows=self.num_rows // count if dim == 0 else self.num_rows,
            layout=layout,
            num_active=self.num_active // count,
            whole=self.layout,
        )


def state_slots(optimizer: str, parameter: Stored) -> int:
    """Returns how many moments ``optimizer`` stores for each entry of ``parameter``, by its rule."""
    return len(slot_names(optimizer, parameter))


def slot_names(optimizer: str, parameter: Stored) -> list[str]:
    """Returns the names of the moments that ``optimizer`` stores for each entry of ``parameter``, by its rule."""
    rule = OPTIMIZERS[optimizer].rule_for(parameter.is_vector, parameter.is_output_head)
    return [slot.name for slot in rule.slots]


@dataclass(frozen=True)
class Recipe:
    """Holds the choices that decide bytes beside the weights.

    Args:
        moment_dtype: None (fp32), a dtype, or "int8".
        fused_update: True where each compact weight is updated in backward and its gradient dies there.
        by_torch: True for ``torch.optim.AdamW(fused=True)``, whose moments have the dtype of the weights.
        optimizer: one of ``OPTIMIZERS``.
    """

    moment_dtype: torch.dtype | str | None = None
    fused_update: bool = True
    by_torch: bool = False
    optimizer: str = "adamw"

    def dtype_of_moments(self, weights: torch.dtype) -> torch.dtype:
        if self.by_torch or weights == torch.float64:
            return weights
        if isinstance(self.moment_dtype, torch.dtype):
            return self.moment_dtype
        return torch.uint8 if self.moment_dtype == "int8" else torch.float32

    def has_scales(self, weights: torch.dtype) -> bool:
        return self.dtype_of_moments(weights) == torch.uint8

    def has_ages(self, parameter: Stored) -> bool:
        """Returns whether the blocks of a compact parameter count their age, at the optimizer's own warm-up."""
        optimizer = OPTIMIZERS[self.optimizer]
        return (
            optimizer.rule_for(parameter.is_vector, parameter.is_output_head).needs_ages or optimizer.warmup_steps > 0
        )

    def slots(self, parameter: Stored) -> int:
        """Returns the number of moments of each entry; 0 for a parameter that is not trained."""
        return state_slots(self.optimizer, parameter) if parameter.trained else 0


def bytes_of(parameter: Stored, recipe: Recipe) -> Bytes:
    """Returns the bytes of one parameter by ``KINDS``."""
    count, size, layout = parameter.num_values, parameter.dtype.itemsize, parameter.layout
    found = dict.fromkeys(KINDS, 0) | {"weights": count * size}
    if layout is not None:
        lists = empty_lists(layout, parameter.num_active, torch.device("meta"))
        found["index"] = -(-layout.num_blocks // 8) + lists.nbytes
    if parameter.trained:
        is_kept = layout is None or not recipe.fused_update
        found["gradients"] = count * size * is_kept
        scales = parameter.num_scales if recipe.has_scales(parameter.dtype) else 0
        moment_bytes = count * recipe.dtype_of_moments(parameter.dtype).itemsize + scales * SCALE_BYTES
        found["moments"] = recipe.slots(parameter) * moment_bytes
        found["ages"] = ages_bytes(parameter, recipe, parameter.num_active)
    return found


def ages_bytes(parameter: Stored, recipe: Recipe, num_blocks: int) -> int:
    """Returns the bytes of the counts of a parameter that is trained, and of the ages of ``num_blocks`` blocks."""
    if recipe.by_torch:
        return _TORCH_STEP_BYTES
    if parameter.layout is None or not recipe.has_ages(parameter):
        return _COUNTS_BYTES
    return _COUNTS_BYTES + _BIRTHS_BYTES + num_blocks


def total_bytes(parameters: Iterable[Stored], recipe: Recipe, buffers: int = 0) -> Bytes:
    """Returns the bytes of a whole model by kind. ``buffers``: the bytes of buffers outside topologies."""
    total = dict.fromkeys(KINDS, 0) | {"buffers": buffers}
    for parameter in parameters:
        for kind, count in bytes_of(parameter, recipe).items():
            total[kind] += count
    return total


def resident_bytes(total: Bytes) -> int:
    """Returns the bytes that are in memory when a step begins: all but the gradients."""
    return sum(total.values()) - total["gradients"]


def values_bytes(parameters: Iterable[Stored], names: Container[str]) -> int:
    """Returns the bytes of the values of the weights with these names."""
    return sum(each.num_values * each.dtype.itemsize for each in parameters if each.name in names)


def parse_bytes(argument: str, size: str | float) -> int:
    """Returns the bytes of "24GB" (24e9), "24GiB" (24 * 2**30), "800MB" or a number of bytes.

    Raises ValueError, naming ``argument``, for anything else.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = _UNITS.get((found[2] or "b").lower()) if found else None
    try:
        number = float(found[1]) * unit if found and unit else size
        return int(arguments.number(argument, number, at_least=1, at_most=2**63))
    except ValueError:
        raise ValueError(
            f'{argument}: expected bytes such as "24GB", "22.5GiB" or 24e9, got {arguments.described(size)}; give the '
            "memory of the device"
        ) from None


def bytes_text(num_bytes: float) -> str:
    """Returns a text such as "1.23 MB" for 1234567."""
    return _text(num_bytes, "B")


def operations_text(number: float) -> str:
    """Returns a text such as "1.50 TFLOP" for 1.5e12."""
    return _text(number, "FLOP")


def _text(number: float, unit: str) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(str(round(abs(number)))))
    return f"{number:,.{digits}f} {_PREFIXES[power]}{unit}"
