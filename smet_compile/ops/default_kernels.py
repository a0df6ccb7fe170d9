"""Lists the kernels of this library, the first choice first. Their modules are imported when they are first needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from smet_compile.ops.kernel import Case, Kernel, UpdateCase
from smet_compile.ops.torch_insides import multiplies_bf16_in_tiles, multiplies_on_cpu

NATIVE, TRITON, _PLAIN = "smet_compile.ops.kernels.native", "smet_compile.ops.kernels.triton", "smet_compile.ops"
_ONLY_CPU, _ONLY_TILES = "runs on the CPU only", "multiplies tiles only"
_AMX_OVER_AVX512 = 4
"""How many times faster a processor with AMX multiplies dense bf16 matrices than ``cpu_tiles`` multiplies tiles."""
_LANES = 16
_MOST_SINGLE_WEIGHTS = 0.5
"""Density up to which ``cpu_single`` is used: there it takes 0.8 to 0.9 of the dense time with AVX-512, 1 with AVX2."""


def _functions(module: str, *ops: str) -> dict[str, Callable[..., Any] | str]:
    return {op: f"{module}:{op}" for op in ops}


def _refusal_of(module: str) -> Callable[[str, Any], str | None]:
    """Returns a refusal that imports a C++ kernel's module, which may compile it, only for tensors on the CPU."""

    def refusal(op: str, case: Any) -> str | None:
        device = case.update.values.device if isinstance(case, UpdateCase) else case.device
        if device.type != "cpu":
            return _ONLY_CPU
        found: str | None = importlib.import_module(module).refusal(case)
        return found

    return refusal


def _refusal_of_triton(only_tiles: bool = False, grouped: bool = True) -> Callable[[str, Any], str | None]:
    def refusal(op: str, case: Any) -> str | None:
        from smet_compile.ops.kernels.triton import supports

        if only_tiles and not case.layout.tiles:
            return _ONLY_TILES
        if case.grouped and not grouped:
            return "does not take tokens sorted by matrix"
        if not supports.runs_on(case.device):
            return supports.missing(case.device)
        known = supports.supports(op, case.device, case.dtype, case.layout, case.grouped)
        return None if known else f"does not compute {case.kind}"

    return refusal


def _refusal_of_tma(op: str, case: Case) -> str | None:
    from smet_compile.ops.kernels.triton import supports

    if not case.layout.tiles:
        return _ONLY_TILES
    return supports.tma_refusal(op, case.device, case.dtype, case.layout, case.grouped)


def _never(case: Any) -> bool:
    """Tells of a kernel that no measurement recommends yet: it is used where its name asks for it."""
    return False


def _refusal_of_triton_updates(op: str, case: UpdateCase) -> str | None:
    from smet_compile.ops.kernels.triton import supports

    device = case.update.values.device
    if not supports.runs_on(device):
        return supports.missing(device)
    found: str | None = importlib.import_module(f"{TRITON}.adamw").refusal(case)
    return found


def _triton_tiles_are_profitable(case: Case) -> bool:
    """Tells whether tiles are faster than an expanded weight, which takes no tokens that are sorted by matrix."""
    from smet_compile.ops.kernels.triton import supports

    return case.grouped or supports.tiles_are_profitable(case.dtype, case.layout, case.density)


def _cpu_tiles_are_profitable(case: Case) -> bool:
    """Tells whether skipping inactive blocks saves more than a dense product gains by its higher speed."""
    filled = min(side / (-(-side // _LANES) * _LANES) for side in case.layout.block_shape)
    slower = _AMX_OVER_AVX512 if case.dtype == torch.bfloat16 and multiplies_bf16_in_tiles() else 1
    return case.density * slower < filled


def _cpu_single_is_profitable(case: Case) -> bool:
    """Tells whether few enough weights are active to be faster than a dense product of all."""
    is_fast = case.dtype.itemsize == 2 and multiplies_on_cpu(case.dtype)  # twice, with AMX eight times: a guess
    slower = (2 * _AMX_OVER_AVX512 if multiplies_bf16_in_tiles() else 2) if is_fast else 1
    return case.density * slower <= _MOST_SINGLE_WEIGHTS


_PRODUCTS, _MOVES = ("masked_matmul", "sampled_matmul"), ("unpack", "pack")
DEFAULT_KERNELS = [
    Kernel(
        "triton_tiles",
        {
            **_functions(f"{TRITON}.matmul_tiles", "masked_matmul"),
            **_functions(f"{TRITON}.sampled_tiles", "sampled_matmul"),
        },
        _refusal_of_triton(only_tiles=True),
        _triton_tiles_are_profitable,
    ),
    Kernel(
        "triton_expand",
        {**_functions(f"{TRITON}.matmul_expanded", *_PRODUCTS), **_functions(f"{TRITON}.expand", *_MOVES)},
        _refusal_of_triton(grouped=False),
    ),
    Kernel(
        "triton_tma",
        {
            **_functions(f"{TRITON}.matmul_tma", "masked_matmul"),
            **_functions(f"{TRITON}.sampled_tma", "sampled_matmul"),
        },
        _refusal_of_tma,
        _never,
    ),
    Kernel("triton_adamw", _functions(f"{TRITON}.adamw", "update_all", "prepare_update"), _refusal_of_triton_updates),
    Kernel(
        "cpu_tiles",
        _functions(f"{NATIVE}.tiles", *_PRODUCTS),
        _refusal_of(f"{NATIVE}.tiles"),
        _cpu_tiles_are_profitable,
    ),
    Kernel(
        "cpu_single",
        _functions(f"{NATIVE}.single", *_PRODUCTS),
        _refusal_of(f"{NATIVE}.single"),
        _cpu_single_is_profitable,
    ),
    Kernel("cpu_expand", _functions(f"{NATIVE}.expand", *_PRODUCTS, *_MOVES), _refusal_of(f"{NATIVE}.expand")),
    Kernel("cpu_rows", _functions(f"{NATIVE}.rows", "scale_rows"), _refusal_of(f"{NATIVE}.rows")),
    Kernel("cpu_adamw", _functions(f"{NATIVE}.adamw", "update_all"), _refusal_of(f"{NATIVE}.adamw")),
    Kernel("cpu_scale", _functions(f"{NATIVE}.scale", "update_all"), _refusal_of(f"{NATIVE}.scale")),
    Kernel(
        "torch",
        {
            **_functions(f"{_PLAIN}.plain", *_PRODUCTS, *_MOVES, "update_all"),
            **_functions(f"{_PLAIN}.row_scale", "scale_rows"),
        },
    ),
    Kernel(
        "reference",
        {
            **_functions(f"{_PLAIN}.law", *_PRODUCTS, *_MOVES, "scale_rows"),
            **_functions(f"{_PLAIN}.law_of_updates", "update_all"),
        },
    ),
]
