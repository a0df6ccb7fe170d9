"""Makes the state of one parameter under any rule, and checks it when it comes from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import Site
from smet_compile.ops.codes import num_scales
from smet_compile.ops.rules import Slot
from smet_compile.optim.generations import check_generations, first_generation
from smet_compile.optim.options import MOST_STEPS

_COUNTS = ("step", "num_skipped")


def moment_dtype(parameter: Tensor, wanted: torch.dtype | str | None) -> torch.dtype:
    """Returns fp32 unless ``wanted`` says otherwise, uint8 codes for "int8"; fp64 for fp64 weights."""
    if parameter.dtype == torch.float64:
        return torch.float64
    return wanted if isinstance(wanted, torch.dtype) else torch.uint8 if wanted == "int8" else torch.float32


@dataclass(frozen=True)
class StateKind:
    """Says what state a parameter has.

    Args:
        slots: those of its rule. dtype: of the slots. has_ages: blocks count their age.
    """

    slots: tuple[Slot, ...]
    dtype: torch.dtype
    site: Site | None
    has_ages: bool

    @property
    def has_scales(self) -> bool:
        return self.dtype == torch.uint8 and bool(self.slots)

    def scales_shape(self, parameter: Tensor) -> tuple[int, int]:
        """Returns one scale per slot for each group of dense positions."""
        return len(self.slots), num_scales(parameter.numel(), self.site.compact.layout if self.site else None)


def new_state(parameter: nn.Parameter, kind: StateKind) -> dict[str, Tensor]:
    """Makes zero slots, no steps; for a compact weight all blocks of the first generation."""
    device = parameter.device
    state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    for slot in kind.slots:
        state[slot.name] = torch.zeros_like(parameter, dtype=kind.dtype, memory_format=torch.preserve_format)
    state["num_skipped"] = torch.zeros((), dtype=torch.int64, device=device)
    if kind.has_scales:
        state["scales"] = torch.zeros(kind.scales_shape(parameter), device=device)
    if kind.site is not None and kind.has_ages:
        state["generation"], state["births"] = first_generation(kind.site.num_active, device)
    return state


def check_state(name: str, parameter: nn.Parameter, kind: StateKind, state: Any) -> None:
    """Raises ValueError where ``state`` is not what this optimizer keeps for the parameter."""
    shape = tuple(parameter.shape)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {slot.name: (kind.dtype, shape) for slot in kind.slots}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{name}: expected a state of tensors, got others; load the state of the same optimizer")
    _check_kinds(name, wanted, state)
    if kind.has_scales:
        wanted["scales"] = (torch.float32, kind.scales_shape(parameter))
    wanted |= {count: (torch.int64, ()) for count in _COUNTS}
    has_ages = kind.site is not None and kind.has_ages
    keys = wanted.keys() | ({"generation", "births"} if has_ages else set())
    if set(state) != keys:
        raise ValueError(
            f"{name}: expected a state of {', '.join(sorted(keys))}, got {', '.join(map(str, state)) or 'none'}; load "
            "the state of the same optimizer and a model made sparse in the same way"
        )
    _check_kinds(name, wanted, state)
    _check_values(name, state, [slot.name for slot in kind.slots if not slot.signed])
    if has_ages and kind.site is not None:
        check_generations(name, state["generation"], state["births"], kind.site.num_active, int(state["step"]))


def _check_kinds(name: str, wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]], state: dict[str, Tensor]) -> None:
    for key, (dtype, shape) in wanted.items():
        if key in state and (state[key].dtype != dtype or state[key].shape != shape):
            raise ValueError(
                f"{name}: expected {key} of {dtype} and shape {shape}, got {state[key].dtype} and "
                f"{tuple(state[key].shape)}; load the state of the same optimizer, with the same moment_dtype, and a "
                "model made sparse in the same way"
            )


def _check_values(name: str, state: dict[str, Tensor], unsigned: list[str]) -> None:
    """Lets slots be infinite or nan, as an overflow leaves them, but a mean of squares is never negative."""
    for key in _COUNTS:
        if not 0 <= int(state[key]) <= MOST_STEPS:
            raise ValueError(f"{name}: expected {key} from 0 to {MOST_STEPS}, got {int(state[key])}")
    for key in (*unsigned, "scales"):
        if key in state and bool((state[key] < 0).any()):
            raise ValueError(f"{name}: expected {key} of at least 0, got {float(state[key].min())}")
    if "scales" in state and not bool(state["scales"].isfinite().all()):
        raise ValueError(f"{name}: expected finite scales, got others")
