"""Says for each kernel why it cannot compute a case; None where it can.

The kernels are imported only when they are asked: some need Triton, or a compiler.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from smet_compile.format import Layout

_ONLY_CPU, _ONLY_TILES = "runs on the CPU only", "multiplies tiles only"
_ONLY_GPU = "needs Triton and a CUDA GPU of compute capability 8.0 or newer"
_OTHER_STATE = "does not take parameters, gradients or optimizer state of this dtype, memory layout or device"


class Case(NamedTuple):
    """Holds what a kernel is chosen by.

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
        """Says what decides whether a kernel can compute it."""
        layout = self.layout
        blocks = "tiles" if layout.tiles else "single weights" if layout.single_weights else "runs"
        sorted_tokens = ", with tokens sorted by matrix," if self.grouped else ""
        return f"{self.dtype} {blocks}{sorted_tokens} on {self.device.type}"


def never(*case: Any) -> None:
    """Refuses nothing."""


def cpu_tiles(op: str, case: Case) -> str | None:
    from smet_compile.ops.kernels.native.matmul_tiles import multiplies

    if case.device.type != "cpu":
        return _ONLY_CPU
    if not case.layout.tiles:
        return _ONLY_TILES
    return None if multiplies(case.dtype) else _not_compiled("tiles") or f"does not multiply {case.dtype} here"


def cpu_expand(op: str, case: Case) -> str | None:
    from smet_compile.ops.kernels.native.expand import moves

    if case.device.type != "cpu":
        return _ONLY_CPU
    return None if moves(case.dtype) else _not_compiled("expand") or f"does not move {case.dtype}"


def _not_compiled(library_name: str) -> str | None:
    from smet_compile.ops.kernels.native.build import library

    return "could not be compiled" if library(library_name) is None else None


def triton(op: str, case: Case) -> str | None:
    from smet_compile.ops.kernels.triton.supports import runs_on, supports

    if supports(op, case.device, case.dtype, case.layout, case.grouped):
        return None
    if not runs_on(case.device):
        return _ONLY_GPU
    return f"does not compute {case.kind}"


def triton_tiles(op: str, case: Case) -> str | None:
    return triton(op, case) if case.layout.tiles else _ONLY_TILES


def triton_products_by_expanding(op: str, case: Case) -> str | None:
    return "does not take tokens sorted by matrix" if case.grouped else triton(op, case)


def triton_adamw(arguments: tuple[Any, ...], traced: bool) -> str | None:
    from smet_compile.ops.kernels.triton.supports import runs_on

    if not runs_on(arguments[0].device):
        return _ONLY_GPU
    from smet_compile.ops.kernels.triton.adamw import supports  # imports Triton

    return None if supports(arguments) else _OTHER_STATE


def cpu_adamw(arguments: tuple[Any, ...], traced: bool) -> str | None:
    from smet_compile.ops.kernels.native.adamw import supports

    if arguments[0].device.type != "cpu":
        return _ONLY_CPU
    return None if supports(arguments, traced) else _not_compiled("adamw") or _OTHER_STATE
