"""Defines the options that all active optimizers share, and checks the options of parameter groups.

Each check returns the option as plain Python, in the range that later arithmetic can represent: a step count is an
int64, a rate a finite number. All errors are ``ValueError`` and name the option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from smet_compile.format.arguments import described, flag, number, whole_number

MOST_STEPS = 2**53
_MOST_EXPONENT = 10.0
_MOMENT_DTYPES = (None, torch.float32, torch.bfloat16, "int8")
_OF_TORCH = frozenset(
    ["amsgrad", "capturable", "dampening", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"]
)
"""Options of optimizers of ``torch.optim`` that no optimizer here has."""


class CommonOptions(TypedDict, total=False):
    """Holds the arguments that every active optimizer takes besides those of its rule.

    Args:
        warmup_steps: W, the steps over which the step size of a grown block rises; 0 for none. May differ by group.
        initial_warmup_steps: W of the blocks that are active from the start; None for that of grown ones. May differ by
            group.
        lr_density_exponent: p; the rate of a weight of density d is multiplied by d^(-p). May differ by group.
        moment_dtype: dtype of the state: None for fp32 (fp64 for fp64 weights), torch.bfloat16, or "int8" for one byte
            each and a scale for every tile or 1024 dense weights.
        stochastic_rounding: whether to round bf16 weights, and bf16 or 8-bit state, stochastically (None: yes) or to
            nearest.
        model: the module that owns the parameters, where these are given instead of it.
        seed: the seed of stochastic rounding.
    """

    warmup_steps: int
    initial_warmup_steps: int | None
    lr_density_exponent: float
    moment_dtype: torch.dtype | Literal["int8"] | None
    stochastic_rounding: bool | None
    model: nn.Module | None
    seed: int


def check_names(optimizer: str, common: CommonOptions | dict[str, Any]) -> None:
    """Raises TypeError for an option that ``optimizer`` does not have; one of ``torch.optim`` is to be left out."""
    for name, value in common.items():
        if name in _OF_TORCH:
            raise TypeError(
                f"{optimizer}: got {name}={described(value)}, an option of torch.optim that it does not have; leave "
                "it out"
            )
        if name not in CommonOptions.__annotations__:
            raise TypeError(f"{optimizer}: got an unexpected keyword argument {name!r}")


def without_model(optimizer: str, params: Any) -> ValueError:
    """Returns the error for ``params`` without a model that owns them."""
    is_empty = isinstance(params, Sequence) and not params
    got = "an empty list" if is_empty else "parameters alone"
    advice = "pass the model" if is_empty else "pass model= so that compact weights are known"
    return ValueError(f"{optimizer}: expected a model, or parameters with model=..., got {got}; {advice}")


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns ``options`` after checking those that are known. Raises ValueError for the first that is out of range."""
    return {name: _CHECKS[name](name, value) if name in _CHECKS else value for name, value in options.items()}


def initial_warmup(group: dict[str, Any]) -> dict[str, int]:
    """Returns the warm-up of the initial blocks of a group: its own, else that of grown blocks, as in older files."""
    given = group.get("initial_warmup_steps")
    return {"initial_warmup_steps": group["warmup_steps"] if given is None else given}


def check_moment_dtype(moment_dtype: Any) -> Any:
    """Returns ``moment_dtype``, which is None, a dtype or "int8"."""
    if not any(
        moment_dtype is known or (isinstance(known, str) and isinstance(moment_dtype, str) and moment_dtype == known)
        for known in _MOMENT_DTYPES
    ):
        raise ValueError(
            f'moment_dtype: expected None, torch.float32, torch.bfloat16 or "int8", got {described(moment_dtype)}'
        )
    return moment_dtype


def _rate(name: str, lr: Any) -> float | Tensor:
    """Returns a rate; a tensor of floating-point numbers stays one, since a compiled step reads it anew each time."""
    if not isinstance(lr, Tensor) or (lr.dim() == 0 and not (lr.is_floating_point() or lr.is_complex())):
        return number(name, lr, at_least=0)
    if lr.dim() != 0 or lr.is_complex() or lr.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected a number or a real tensor without dimensions, got {described(lr)}; pass a float"
        )
    number(name, lr.detach(), at_least=0)
    return lr


def _betas(name: str, betas: Any) -> tuple[float, float]:
    is_list = isinstance(betas, Sequence) and not isinstance(betas, str | bytes)
    listed = list(betas) if is_list or getattr(betas, "shape", None) == (2,) else []
    if len(listed) != 2:
        raise ValueError(
            f"{name}: expected two numbers in [0, 1), got {described(betas)}; pass a pair such as (0.9, 0.999)"
        )
    first, second = (number(name, beta, at_least=0, below=1) for beta in listed)
    return first, second


def _at_least_zero(name: str, value: Any) -> float:
    return number(name, value, at_least=0)


def _below_one(name: str, value: Any) -> float:
    return number(name, value, at_least=0, below=1)


def _steps(name: str, value: Any) -> int:
    return whole_number(name, value, at_least=0, at_most=MOST_STEPS)


def _steps_or_none(name: str, value: Any) -> int | None:
    return None if value is None else _steps(name, value)


def _exponent(name: str, value: Any) -> float:
    return number(name, value, at_least=-_MOST_EXPONENT, at_most=_MOST_EXPONENT)


_CHECKS = {
    "lr": _rate,
    "betas": _betas,
    "eps": _at_least_zero,
    "weight_decay": _at_least_zero,
    "momentum": _below_one,
    "nesterov": flag,
    "warmup_steps": _steps,
    "initial_warmup_steps": _steps_or_none,
    "lr_density_exponent": _exponent,
}
