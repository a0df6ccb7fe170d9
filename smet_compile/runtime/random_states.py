"""The states of torch's random generators: taken, checked, restored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smet_compile.ops.loaded import check_keys, check_tensor

_MT19937_BYTES = 5056
_LEFT, _NEXT = slice(8, 12), slice(16, 24)
_MT19937_WORDS = 624


def random_states() -> dict[str, Any]:
    """Returns the state of the CPU's generator, and those of all GPUs where this process uses any."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if _cuda_is_used() else []}


def check_random_states(states: Any) -> None:
    """Raises ValueError where ``states`` cannot be restored. Tries each on a generator of its own."""
    check_keys("random", states, ("cpu", "cuda"))
    _try("random.cpu", states["cpu"], torch.Generator())
    _check_place_in_table(states["cpu"])
    if not isinstance(states["cuda"], list):
        raise ValueError(f"random.cuda: expected a list of states, got {type(states['cuda']).__name__}")
    for i, state in enumerate(states["cuda"]):
        where = f"random.cuda.{i}"
        if _are_ours(states["cuda"]):
            _try(where, state, torch.Generator(f"cuda:{i}"))
        elif not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError(f"{where}: expected a vector of bytes, got something else")


def restore_random_states(states: dict[str, Any]) -> None:
    """Restores what ``random_states`` returned; GPU states only where there are as many GPUs."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and _are_ours(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def _cuda_is_used() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _are_ours(states: list[Any]) -> bool:
    return torch.cuda.is_available() and len(states) == torch.cuda.device_count()


def _try(where: str, state: Any, scratch: torch.Generator) -> None:
    check_tensor(where, state, torch.uint8, tuple(scratch.get_state().shape))
    try:
        scratch.set_state(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: expected the state of a generator, got another ({error})") from error


def _check_place_in_table(state: Tensor) -> None:
    """torch checks the two counts of a Mersenne twister one by one; together they must stay within its table."""
    if state.numel() == _MT19937_BYTES:
        data = bytes(state.tolist())
        left, upcoming = (int.from_bytes(data[part], "little") for part in (_LEFT, _NEXT))
        if left + upcoming > _MT19937_WORDS + 1:
            raise ValueError(
                f"random.cpu: expected a place within the generator's {_MT19937_WORDS} words, got {upcoming} with "
                f"{left} left"
            )
