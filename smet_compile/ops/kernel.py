"""Describes a kernel: what it computes, what it cannot, and where it is worth while."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from smet_compile.format import Layout
from smet_compile.ops.updates import Update

OPS = ("masked_matmul", "sampled_matmul", "unpack", "pack", "scale_rows", "update_all")
"""The ops that a kernel may compute. ``sampled_update`` joins two of them in one kernel."""


class Case(NamedTuple):
    """Holds the facts that decide which kernel multiplies with, packs or unpacks a weight.

    Args:
        grouped: tokens come sorted by matrix, with offsets.
    """

    device: torch.device
    dtype: torch.dtype
    layout: Layout
    num_active: int
    grouped: bool = False

    @property
    def density(self) -> float:
        return self.num_active / self.layout.num_blocks

    @property
    def kind(self) -> str:
        """Describes the case for a warning, without sizes and density."""
        layout = self.layout
        blocks = "tiles" if layout.tiles else "single weights" if layout.single_weights else "runs"
        sorted_tokens = ", with tokens sorted by matrix," if self.grouped else ""
        return f"{self.dtype} {blocks}{sorted_tokens} on {self.device.type}"


class UpdateCase(NamedTuple):
    """Holds the facts that decide which kernel makes an optimizer step. ``is_traced``: its tensors are fake."""

    update: Update
    is_traced: bool = False

    @property
    def kind(self) -> str:
        update = self.update
        slots = {str(slot.dtype) for slot in update.slots}
        state = f"{' and '.join(sorted(slots))} state" if slots else "no state"
        where = f"by the rule {update.rule.name} on {update.values.device.type}"
        return f"{update.values.dtype} parameters with {state} {where}"


def _takes_everything(op: str, case: Any) -> str | None:
    return None


def _always(case: Any) -> bool:
    return True


class Kernel(NamedTuple):
    """Describes an implementation of some of the ops.

    Args:
        name: its name in ``SMET_COMPILE_KERNEL`` and ``explain``.
        functions: op → the function, or "module:function" to import it when it is first chosen. It has the signature of
            the function of that name in ``ops.plain``. Beside ``update_all`` there may be ``prepare_update``, of one
            update: it makes what the kernel keeps on the device, before a graph would make it in its own memory.
        refusal: (op, case) → why it cannot compute a case; None where it can. The case is a ``Case``, or an
            ``UpdateCase`` for ``update_all``.
        is_profitable: (case) → whether it is faster there than the kernels after it.
    """

    name: str
    functions: dict[str, Callable[..., Any] | str]
    refusal: Callable[[str, Any], str | None] = _takes_everything
    is_profitable: Callable[[Any], bool] = _always

    def function(self, op: str) -> Callable[..., Any]:
        found = self.functions[op]
        if isinstance(found, str):
            module, name = found.split(":")
            found = self.functions[op] = getattr(importlib.import_module(module), name)
        return found
