"""The state of one parameter: made, and checked when it comes from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import Site
from smet_compile.ops.codes import num_scales
from smet_compile.optim.generations import first_generation


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
    wanted = {"exp_avg": (dtype, tuple(parameter.shape)), "exp_avg_sq": (dtype, tuple(parameter.shape))}
    _check_moments(name, wanted, state)
    if dtype == torch.uint8:
        wanted["scales"] = (torch.float32, _scales_shape(parameter, site))
    keys = {"step", "num_skipped", *wanted} | ({"generation", "births"} if site else set())
    if set(state) != keys:
        raise ValueError(
            f"{name}: expected a state of {', '.join(sorted(keys))}, got {', '.join(sorted(state)) or 'none'}; load "
            "the state of the same optimizer and a model made sparse in the same way"
        )
    _check_moments(name, wanted, state)


def _scales_shape(parameter: Tensor, site: Site | None) -> tuple[int, int]:
    """Of both moments, one scale for each group of dense positions."""
    return 2, num_scales(parameter.numel(), site.compact.layout if site else None)


def _check_moments(name: str, wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]], state: Any) -> None:
    for key, (dtype, shape) in wanted.items():
        if key in state and (state[key].dtype != dtype or state[key].shape != shape):
            raise ValueError(
                f"{name}: expected {key} of {dtype} and shape {shape}, got {state[key].dtype} and "
                f"{tuple(state[key].shape)}; load the state of the same optimizer, with the same state_dtype, and a "
                "model made sparse in the same way"
            )
