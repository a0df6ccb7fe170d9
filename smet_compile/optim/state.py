"""The state of one parameter: made, and checked when it comes from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import Site
from smet_compile.ops.codes import num_scales
from smet_compile.optim.generations import check_generations, first_generation

_MOST_STEPS = 2**53


def moment_dtype(parameter: Tensor, wanted: torch.dtype | str | None) -> torch.dtype:
    """fp32 unless ``wanted`` says otherwise, uint8 codes for "int8"; fp64 for fp64 weights."""
    if parameter.dtype == torch.float64:
        return torch.float64
    return wanted if isinstance(wanted, torch.dtype) else torch.uint8 if wanted == "int8" else torch.float32


def new_state(parameter: nn.Parameter, site: Site | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero moments of ``dtype``, no steps; for a compact weight all blocks of the first generation."""
    device = parameter.device
    state = {
        "step": torch.zeros((), dtype=torch.int64, device=device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format),
        "num_skipped": torch.zeros((), dtype=torch.int64, device=device),
    }
    if dtype == torch.uint8:
        state["scales"] = torch.zeros(_scales_shape(parameter, site), device=device)
    if site is not None:
        state["generation"], state["births"] = first_generation(site.num_active, device)
    return state


def check_state(name: str, parameter: nn.Parameter, site: Site | None, dtype: torch.dtype, state: Any) -> None:
    """Raises ValueError where ``state`` is not what this optimizer keeps for the parameter."""
    shape = tuple(parameter.shape)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"exp_avg": (dtype, shape), "exp_avg_sq": (dtype, shape)}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{name}: expected a state of tensors, got others; load the state of the same optimizer")
    _check_kinds(name, wanted, state)
    if dtype == torch.uint8:
        wanted["scales"] = (torch.float32, _scales_shape(parameter, site))
    wanted |= {"step": (torch.int64, ()), "num_skipped": (torch.int64, ())}
    keys = wanted.keys() | ({"generation", "births"} if site else set())
    if set(state) != keys:
        raise ValueError(
            f"{name}: expected a state of {', '.join(sorted(keys))}, got {', '.join(map(str, state)) or 'none'}; load "
            "the state of the same optimizer and a model made sparse in the same way"
        )
    _check_kinds(name, wanted, state)
    _check_values(name, state)
    if site is not None:
        check_generations(name, state["generation"], state["births"], site.num_active, int(state["step"]))


def _scales_shape(parameter: Tensor, site: Site | None) -> tuple[int, int]:
    """Of both moments, one scale for each group of dense positions."""
    return 2, num_scales(parameter.numel(), site.compact.layout if site else None)


def _check_kinds(name: str, wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]], state: dict[str, Tensor]) -> None:
    for key, (dtype, shape) in wanted.items():
        if key in state and (state[key].dtype != dtype or state[key].shape != shape):
            raise ValueError(
                f"{name}: expected {key} of {dtype} and shape {shape}, got {state[key].dtype} and "
                f"{tuple(state[key].shape)}; load the state of the same optimizer, with the same state_dtype, and a "
                "model made sparse in the same way"
            )


def _check_values(name: str, state: dict[str, Tensor]) -> None:
    """Moments may be infinite or nan, as an overflow leaves them, but a mean of squares is never negative."""
    for key in ("step", "num_skipped"):
        if not 0 <= int(state[key]) <= _MOST_STEPS:
            raise ValueError(f"{name}: expected {key} from 0 to {_MOST_STEPS}, got {int(state[key])}")
    for key in ("exp_avg_sq", "scales"):
        if key in state and bool((state[key] < 0).any()):
            raise ValueError(f"{name}: expected {key} of at least 0, got {float(state[key].min())}")
    if "scales" in state and not bool(state["scales"].isfinite().all()):
        raise ValueError(f"{name}: expected finite scales, got others")
