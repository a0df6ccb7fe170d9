"""The one place that chooses the kernel of an op: by device, dtype, block shape and density, or as told.

``SMET_COMPILE_KERNEL`` names a kernel to use wherever it can be used: ``reference`` (the definition), ``torch`` (plain
torch), ``cpu_tiles``, ``cpu_expand`` and ``cpu_adamw`` (C++), ``triton_tiles``, ``triton_expand`` and ``triton_adamw``;
or ``cpu`` or ``triton`` for any of three. Elsewhere, and where nothing is told, the first of a list is taken that can
do the case and pays. A warning names each kind of case that the named kernel has a function for and cannot compute.
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
from smet_compile.ops import refusals
from smet_compile.ops.refusals import Case as Case
from smet_compile.ops.warn import warn_once

_VARIABLE = "SMET_COMPILE_KERNEL"
_NATIVE, _TRITON = "smet_compile.ops.kernels.native", "smet_compile.ops.kernels.triton"
_NARROWEST_TILE = 16
_AMX_OVER_AVX512 = 4
"""How much faster a processor with AMX multiplies dense bf16 matrices than these kernels multiply tiles."""
_LANES = 16
_LISTS = slice(12, 15)
"""Shape, matrix and block_shape among the arguments of ``active_adamw_``."""


class Kernel(NamedTuple):
    """One way to compute some ops.

    Args:
        name: as ``SMET_COMPILE_KERNEL`` and ``explain`` know it. module: has a function named as the op.
        refusal: says why it cannot compute a case; None where it can.
        pays: whether it is faster there than what comes after it.
    """

    name: str
    module: str
    refusal: Callable[[str, Case], str | None]
    pays: Callable[[Case], bool] = lambda case: True

    def can(self, op: str, case: Case) -> bool:
        return self.refusal(op, case) is None


def _cpu_tiles_pay(case: Case) -> bool:
    """Where skipping blocks is faster than multiplying all of them, at the processor's speed for dense matrices."""
    bm, bn = case.layout.block_shape
    filled = min(side / (-(-side // _LANES) * _LANES) for side in (bm, bn))
    slower = _AMX_OVER_AVX512 if case.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else 1
    return case.density * slower < filled


def _triton_tiles_pay(case: Case) -> bool:
    return min(case.layout.block_shape) >= _NARROWEST_TILE


class UpdateKernel(NamedTuple):
    """One way to make optimizer steps.

    Args:
        module: has ``update_all``.
        refusal: says why it does not take a parameter; None where it does. Gets its arguments of ``active_adamw_`` and
            whether these are traced: then they only stand for tensors.
    """

    name: str
    module: str
    refusal: Callable[[tuple[Any, ...], bool], str | None]

    def can(self, arguments: tuple[Any, ...], traced: bool) -> bool:
        return self.refusal(arguments, traced) is None


_REFERENCE = Kernel("reference", "smet_compile.ops.definition", refusals.never)


def _products(triton_tiles: str) -> tuple[Kernel, ...]:
    return (
        Kernel("triton_tiles", f"{_TRITON}.{triton_tiles}", refusals.triton_tiles, _triton_tiles_pay),
        Kernel("triton_expand", f"{_TRITON}.matmul_expanded", refusals.triton_products_by_expanding),
        Kernel("cpu_tiles", f"{_NATIVE}.matmul_tiles", refusals.cpu_tiles, _cpu_tiles_pay),
        Kernel("cpu_expand", f"{_NATIVE}.matmul_expanded", refusals.cpu_expand),
        Kernel("torch", "smet_compile.ops.matmul", refusals.never),
        _REFERENCE,
    )


_MOVES = (
    Kernel("triton_expand", f"{_TRITON}.expand", refusals.triton),
    Kernel("cpu_expand", f"{_NATIVE}.expand", refusals.cpu_expand),
    Kernel("torch", "smet_compile.ops.moves", refusals.never),
    _REFERENCE,
)
_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "masked_matmul": _products("matmul_tiles"),
    "sampled_matmul": _products("sampled_tiles"),
    "unpack": _MOVES,
    "pack": _MOVES,
}
_UPDATES = (
    UpdateKernel("triton_adamw", f"{_TRITON}.adamw", refusals.triton_adamw),
    UpdateKernel("cpu_adamw", f"{_NATIVE}.adamw", refusals.cpu_adamw),
    UpdateKernel("torch", "smet_compile.ops.adamw", refusals.never),
    UpdateKernel("reference", "smet_compile.ops.adamw", refusals.never),
)
_NAMES_OF_ALL = [kernel.name for kernel in _KERNELS["masked_matmul"]] + [kernel.name for kernel in _UPDATES]
NAMES = tuple(dict.fromkeys([*_NAMES_OF_ALL, "cpu", "triton"]))


def kernel_of(op: str, case: Case) -> str:
    """The name of the kernel that computes ``op``: unpack, pack, masked_matmul or sampled_matmul."""
    return _chosen(op, case, forced())[0].name


def compute(op: str, case: Case) -> Any:
    """The function that computes ``op``; it takes what the op takes."""
    return getattr(importlib.import_module(_reported(op, case).module), op)


def update_kernel_of(arguments: tuple[Any, ...], traced: bool = False) -> UpdateKernel:
    """The kernel that makes the optimizer step of a parameter, by its arguments of ``active_adamw_``."""
    name = forced()
    named = [kernel for kernel in _UPDATES if name is not None and kernel.name.startswith(name)]
    chosen = next(kernel for kernel in (*named, *_UPDATES) if kernel.can(arguments, traced))
    if named and chosen not in named and not traced:
        values, _, exp_avg = arguments[:3]
        kind = f"{values.dtype} parameters with {exp_avg.dtype} moments on {values.device.type}"
        reasons = {kernel.name: str(kernel.refusal(arguments, traced)) for kernel in named}
        warn_once(_miss(name, "the optimizer step", kind, reasons, chosen.name))
    return chosen


def fused_update(left: Tensor, offsets: Tensor | None, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
    """What computes a gradient's blocks and updates by them as they are summed up; None where that takes two kernels.

    ``left``: the product's. ``arguments``: of ``active_adamw_``.
    """
    case = case_of(left, arguments[_LISTS], arguments[0].shape[0], offsets)
    chosen = _reported("sampled_matmul", case).name, update_kernel_of(arguments).name
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


def _reported(op: str, case: Case) -> Kernel:
    """Returns the kernel that computes ``op``; warns where another one was named for it."""
    kernel, miss = _chosen(op, case, forced())
    if miss is not None:
        warn_once(miss)
    return kernel


@functools.lru_cache(maxsize=4096)
def _chosen(op: str, case: Case, name: str | None) -> tuple[Kernel, str | None]:
    """Returns the kernel for a case, and a warning where it is none of those that ``name`` stands for."""
    named = [kernel for kernel in _KERNELS[op] if name is not None and kernel.name.startswith(name)]
    able = [kernel for kernel in _KERNELS[op] if kernel.can(op, case)]
    told = [kernel for kernel in named if kernel in able]
    kernel = next((kernel for kernel in told or able if kernel.pays(case)), (told or able)[0])
    if told or not named:
        return kernel, None
    reasons = {each.name: str(each.refusal(op, case)) for each in named}
    return kernel, _miss(name, op, case.kind, reasons, kernel.name)


def _miss(name: str | None, what: str, kind: str, reasons: dict[str, str], instead: str) -> str:
    why = " and ".join(f"{kernel} {reason}" for kernel, reason in reasons.items())
    return (
        f"{_VARIABLE}={name}: {instead} computes {what} of {kind}, since {why}; name a kernel that can, or unset "
        "the variable"
    )


def case_of(tensor: Tensor, lists: Any, num_active: int, offsets: Tensor | None = None) -> Case:
    """The case of an op on ``tensor``; ``lists``: shape, matrix and block_shape."""
    return Case(tensor.device, tensor.dtype, Layout.of_lists(*lists), num_active, offsets is not None)
