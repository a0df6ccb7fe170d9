"""The state of one parameter: made, and checked when it comes from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import Site
from smet_compile.optim.generations import first_generation


def moment_dtype(parameter: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """fp32 unless ``wanted`` says otherwise; fp64 for fp64 weights."""
    return torch.float64 if parameter.dtype == torch.float64 else wanted or torch.float32


def new_state(parameter: nn.Parameter, site: Site | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero moments of ``dtype``, no steps; for a compact weight all blocks of the first generation."""
    device = parameter.device
    state = {
        "step": torch.zeros((), dtype=torch.int64, device=device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format),
        "num_skipped": torch.zeros((), dtype=torch.int64, device=device),
    }
    if site is not None:
        state["generation"], state["births"] = first_generation(site.num_active, device)
    return state


def check_state(name: str, parameter: nn.Parameter, site: Site | None, dtype: torch.dtype, state: Any) -> None:
    """Raises ValueError where ``state`` is not what this optimizer keeps for the parameter."""
    keys = {"step", "exp_avg", "exp_avg_sq", "num_skipped"} | ({"generation", "births"} if site else set())
    if set(state) != keys:
        raise ValueError(
            f"{name}: expected a state of {', '.join(sorted(keys))}, got {', '.join(sorted(state)) or 'none'}; load "
            "the state of the same optimizer and a model made sparse in the same way"
        )
    for key in ("exp_avg", "exp_avg_sq"):
        if state[key].shape != parameter.shape or state[key].dtype != dtype:
            raise ValueError(
                f"{name}: expected {key} of {dtype} and shape {tuple(parameter.shape)}, got {state[key].dtype} and "
                f"{tuple(state[key].shape)}; load the state of the same optimizer and a model made sparse in the "
                "same way"
            )
