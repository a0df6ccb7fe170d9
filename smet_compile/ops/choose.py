"""The one place that chooses the kernel of an op: by device, dtype, block shape and density, or as told.

``SMET_COMPILE_KERNEL`` names a kernel to use wherever it can be used: ``reference`` (the definition), ``torch`` (plain
torch), ``cpu_tiles``, ``cpu_expand`` and ``cpu_adamw`` (C++), ``triton_tiles``, ``triton_expand`` and ``triton_adamw``;
or ``cpu`` or ``triton`` for any of three. Elsewhere, and where nothing is told, the first of a list is taken that can
do the case and pays.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout

_VARIABLE = "SMET_COMPILE_KERNEL"
_NATIVE, _TRITON = "smet_compile.ops.kernels.native", "smet_compile.ops.kernels.triton"
_NARROWEST_TILE = 16
_AMX_OVER_AVX512 = 4
"""How much faster a processor with AMX multiplies dense bf16 matrices than these kernels multiply tiles."""
_LANES = 16
_LISTS = slice(12, 15)
"""Shape, matrix and block_shape among the arguments of ``active_adamw_``."""


class Case(NamedTuple):
    """What a kernel is chosen by.

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


class Kernel(NamedTuple):
    """One way to compute some ops.

    Args:
        name: as ``SMET_COMPILE_KERNEL`` and ``explain`` know it. module: has a function named as the op.
        can: whether it computes a case at all. pays: whether it is faster there than what comes after it.
    """

    name: str
    module: str
    can: Callable[[str, Case], bool]
    pays: Callable[[Case], bool] = lambda case: True


def _cpu_multiplies(op: str, case: Case) -> bool:
    from smet_compile.ops.kernels.native.matmul_tiles import multiplies

    return case.device.type == "cpu" and case.layout.tiles and multiplies(case.dtype)


def _cpu_tiles_pay(case: Case) -> bool:
    """Where skipping blocks is faster than multiplying all of them, at the processor's speed for dense matrices."""
    bm, bn = case.layout.block_shape
    filled = min(side / (-(-side // _LANES) * _LANES) for side in (bm, bn))
    slower = _AMX_OVER_AVX512 if case.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else 1
    return case.density * slower < filled


def _cpu_moves(op: str, case: Case) -> bool:
    from smet_compile.ops.kernels.native.expand import moves

    return case.device.type == "cpu" and moves(case.dtype)


def _triton_can(op: str, case: Case) -> bool:
    from smet_compile.ops.kernels.triton.supports import supports

    return supports(op, case.device, case.dtype, case.layout, case.grouped)


def _triton_tiles_can(op: str, case: Case) -> bool:
    return case.layout.tiles and _triton_can(op, case)


def _triton_tiles_pay(case: Case) -> bool:
    return min(case.layout.block_shape) >= _NARROWEST_TILE


def _triton_expands(op: str, case: Case) -> bool:
    return not case.grouped and _triton_can(op, case)


def _always(op: str, case: Case) -> bool:
    return True


class UpdateKernel(NamedTuple):
    """One way to make optimizer steps.

    Args:
        module: has ``update_all``. can: whether it takes a parameter, by its arguments of ``active_adamw_`` and whether
            these are traced: then they only stand for tensors.
    """

    name: str
    module: str
    can: Callable[[tuple[Any, ...], bool], bool]


def _triton_updates(arguments: tuple[Any, ...], traced: bool) -> bool:
    from smet_compile.ops.kernels.triton.supports import runs_on

    return runs_on(arguments[0].device) and bool(importlib.import_module(f"{_TRITON}.adamw").supports(arguments))


def _cpu_updates(arguments: tuple[Any, ...], traced: bool) -> bool:
    from smet_compile.ops.kernels.native.adamw import supports

    return supports(arguments, traced)


_REFERENCE = Kernel("reference", "smet_compile.ops.definition", _always)


def _products(triton_tiles: str) -> tuple[Kernel, ...]:
    return (
        Kernel("triton_tiles", f"{_TRITON}.{triton_tiles}", _triton_tiles_can, _triton_tiles_pay),
        Kernel("triton_expand", f"{_TRITON}.matmul_expanded", _triton_expands),
        Kernel("cpu_tiles", f"{_NATIVE}.matmul_tiles", _cpu_multiplies, _cpu_tiles_pay),
        Kernel("cpu_expand", f"{_NATIVE}.matmul_expanded", _cpu_moves),
        Kernel("torch", "smet_compile.ops.matmul", _always),
        _REFERENCE,
    )


_MOVES = (
    Kernel("triton_expand", f"{_TRITON}.expand", _triton_can),
    Kernel("cpu_expand", f"{_NATIVE}.expand", _cpu_moves),
    Kernel("torch", "smet_compile.ops.moves", _always),
    _REFERENCE,
)
_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "masked_matmul": _products("matmul_tiles"),
    "sampled_matmul": _products("sampled_tiles"),
    "unpack": _MOVES,
    "pack": _MOVES,
}
_UPDATES = (
    UpdateKernel("triton_adamw", f"{_TRITON}.adamw", _triton_updates),
    UpdateKernel("cpu_adamw", f"{_NATIVE}.adamw", _cpu_updates),
    UpdateKernel("torch", "smet_compile.ops.adamw", lambda arguments, traced: True),
    UpdateKernel("reference", "smet_compile.ops.adamw", lambda arguments, traced: True),
)
_NAMES_OF_ALL = [kernel.name for kernel in _KERNELS["masked_matmul"]] + [kernel.name for kernel in _UPDATES]
NAMES = tuple(dict.fromkeys([*_NAMES_OF_ALL, "cpu", "triton"]))


def kernel_of(op: str, case: Case) -> str:
    """The name of the kernel that computes ``op``: unpack, pack, masked_matmul or sampled_matmul."""
    return _chosen(op, case, forced()).name


def compute(op: str, case: Case) -> Any:
    """The function that computes ``op``; it takes what the op takes."""
    kernel = _chosen(op, case, forced())
    return getattr(importlib.import_module(kernel.module), op)


def update_kernel_of(arguments: tuple[Any, ...], traced: bool = False) -> UpdateKernel:
    """The kernel that makes the optimizer step of a parameter, by its arguments of ``active_adamw_``."""
    name = forced()
    told = [kernel for kernel in _UPDATES if name is not None and kernel.name.startswith(name)]
    return next(kernel for kernel in (*told, *_UPDATES) if kernel.can(arguments, traced))


def fused_update(left: Tensor, offsets: Tensor | None, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
    """What computes a gradient's blocks and updates by them as they are summed up; None where that takes two kernels.

    ``left``: the product's. ``arguments``: of ``active_adamw_``.
    """
    case = case_of(left, arguments[_LISTS], arguments[0].shape[0], offsets)
    chosen = kernel_of("sampled_matmul", case), update_kernel_of(arguments).name
    if chosen != ("triton_tiles", "triton_adamw"):
        return None
    function: Callable[..., None] = importlib.import_module(f"{_TRITON}.sampled_adamw").sampled_active_adamw_
    return function


def forced() -> str | None:
    """The kernel that the environment names; None where it names none.

    Raises ValueError where there is no kernel of that name.
    """
    name = os.environ.get(_VARIABLE) or None
    if name is not None and name not in NAMES:
        raise ValueError(f"{_VARIABLE}: expected one of {', '.join(NAMES)}, got {name!r}; unset it to have one chosen")
    return name


@functools.lru_cache(maxsize=4096)
def _chosen(op: str, case: Case, name: str | None) -> Kernel:
    able = [kernel for kernel in _KERNELS[op] if kernel.can(op, case)]
    told = [kernel for kernel in able if name is not None and kernel.name.startswith(name)]
    paying = [kernel for kernel in told or able if kernel.pays(case)]
    return (paying or told)[0]


def case_of(tensor: Tensor, lists: Any, num_active: int, offsets: Tensor | None = None) -> Case:
    """The case of an op on ``tensor``; ``lists``: shape, matrix and block_shape."""
    return Case(tensor.device, tensor.dtype, Layout.of_lists(*lists), num_active, offsets is not None)
