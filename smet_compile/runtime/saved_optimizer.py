"""Checks the saved state of any optimizer before it is loaded.

An optimizer that has a method ``check_state_dict`` checks its own. One of ``torch.optim`` is asked what state it
would make: it steps on small parameters that stand for the real ones. Of any other, present state is the measure.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.ops.loaded import check_alike, check_keys, kind_of
from smet_compile.ops.saved_groups import Saved, check_groups

_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf")
_FLAGS_OF_DEVICES = ("foreach", "fused", "capturable", "differentiable")


def check_optimizer_state(optimizer: Optimizer, state_dict: Any) -> None:
    """Raises ValueError where ``state_dict`` is not what ``optimizer`` could have saved."""
    if hasattr(optimizer, "check_state_dict"):
        optimizer.check_state_dict(state_dict)
        return
    ours = optimizer.state_dict()
    if not has_usual_parts(ours):
        check_keys("optimizer", state_dict, ours.keys())
        return
    saved = check_groups(state_dict, optimizer, _options_without_default(optimizer))
    for i, group in enumerate(state_dict["param_groups"]):
        _check_by_constructor(f"param_groups[{i}]", optimizer, group, optimizer.param_groups[i])
    for number, state in state_dict["state"].items():
        if number in saved:
            _check_state(f"state of parameter {number}", optimizer, saved[number], state)
        elif number not in optimizer.state:
            raise ValueError(f"state: expected that of the optimizer's parameters, got that of {number!r:.80}")


def has_usual_parts(state_dict: dict[str, Any]) -> bool:
    """Returns whether a state dict is made as ``torch.optim.Optimizer`` makes it; some classes make their own."""
    return isinstance(state_dict.get("state"), dict) and isinstance(state_dict.get("param_groups"), list)


def numbers_with_state(state_dict: dict[str, Any]) -> list[Hashable]:
    """Returns which parameters have state, so that a file cannot lose some of it unseen."""
    if not has_usual_parts(state_dict):
        return []
    return [number for number, state in state_dict["state"].items() if state]


def _is_torch_optim(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _options_without_default(optimizer: Optimizer) -> set[str]:
    """Options that a group must have: of others, ``torch`` knows what older versions meant."""
    if not _is_torch_optim(optimizer):
        return set(optimizer.defaults)
    bare: Optimizer = object.__new__(type(optimizer))
    bare.__dict__.update(defaults=dict(optimizer.defaults))
    bare.__setstate__({"state": defaultdict(dict), "param_groups": [{"params": []}]})
    return set(optimizer.defaults) - bare.param_groups[0].keys()


def _check_by_constructor(where: str, optimizer: Optimizer, group: dict[str, Any], ours: dict[str, Any]) -> None:
    """Options are in range where the constructor takes them; a class whose present options it refuses is not asked."""
    if not _is_torch_optim(optimizer) or not ours["params"]:
        return
    names = _arguments(optimizer)
    for fixed in group.keys() & optimizer.defaults.keys() - names:
        if group[fixed] != ours[fixed]:
            raise ValueError(f"{where}.{fixed}: expected {ours[fixed]!r} as {type(optimizer).__name__} sets it")
    if _refusal(optimizer, {name: ours[name] for name in names}, ours["params"][0]) is None:
        refusal = _refusal(optimizer, {name: group[name] for name in names & group.keys()}, ours["params"][0])
        if refusal is not None:
            raise ValueError(f"{where}: {refusal}") from refusal


def _arguments(optimizer: Optimizer) -> set[str]:
    """The options that the constructor takes."""
    return inspect.signature(type(optimizer)).parameters.keys() & optimizer.defaults.keys()


def _refusal(optimizer: Optimizer, options: dict[str, Any], like: nn.Parameter) -> Exception | None:
    scratch = nn.Parameter(torch.zeros((1, 1), dtype=like.dtype, device=like.device), like.requires_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            type(optimizer)([scratch], **options)
        except (ValueError, TypeError, RuntimeError) as error:
            return error
    return None


def _check_state(where: str, optimizer: Optimizer, saved: Saved, state: Any) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"{where}: expected a dict, got {kind_of(state)}")
    if not state:
        return
    shape = tuple(saved.parameter.shape)
    expected = _state_after_a_step(optimizer, saved)
    if expected is None:
        _check_like_present(where, optimizer.state.get(saved.parameter, {}), state, shape)
    else:
        for key in expected.keys() - state.keys():
            raise ValueError(f"{where}: expected {key!r} in it, found none; load the state of the same optimizer")
        for key, value in state.items():
            if isinstance(expected.get(key, value), Tensor):
                shapes = _shapes(expected.get(key), _small(saved.parameter), shape)
                _check_tensor(f"{where}: {key}", value, expected.get(key), shapes)
            elif key in expected or not isinstance(value, int | float | None):
                check_alike(f"{where}: {key}", value, expected.get(key))
    for key, value in state.items():
        _check_range(f"{where}: {key}", key, value)


def _check_like_present(where: str, present: dict[str, Any], state: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Checks against the present state where the optimizer is not known; lists and numbers may come and go."""
    for key in present.keys() & state.keys():
        if isinstance(present[key], Tensor) and isinstance(state[key], Tensor):
            _check_tensor(f"{where}: {key}", state[key], present[key], _shapes(present[key], shape, shape))


def _shapes(
    expected: Tensor | None, per_weight: tuple[int, ...], shape: tuple[int, ...]
) -> set[tuple[int, ...]] | None:
    """The shapes that a state may have; None where the optimizer makes one of another kind, whatever it may be."""
    if expected is None:
        return {shape, ()}
    if tuple(expected.shape) == per_weight:
        return {shape}
    return {()} if expected.dim() == 0 else None


def _check_tensor(where: str, value: Any, expected: Tensor | None, shapes: set[tuple[int, ...]] | None) -> None:
    if not isinstance(value, Tensor) or (shapes is not None and tuple(value.shape) not in shapes):
        raise ValueError(f"{where}: expected a tensor of shape {shapes or 'known'}, got {kind_of(value)}")
    if expected is None:
        return
    kinds = [
        (t.is_floating_point(), t.is_complex(), None if t.is_floating_point() else t.dtype) for t in (value, expected)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{where}: expected {expected.dtype}, got {value.dtype}")


def _check_range(where: str, key: Any, value: Any) -> None:
    """A scalar is finite, a step count and a mean of squares not negative. Moments may overflow, as in training."""
    if isinstance(value, Tensor) and value.dim() == 0 and not bool(value.isfinite()):
        raise ValueError(f"{where}: expected a finite number, got {value.item()}")
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if key not in ("step", *_NEVER_NEGATIVE):
        return
    if isinstance(value, Tensor) and not value.is_complex() and bool((value < 0).any()):
        raise ValueError(f"{where}: expected at least 0, got {float(value.min())}")
    if isinstance(value, int | float) and value < 0:
        raise ValueError(f"{where}: expected at least 0, got {value}")


def _small(parameter: nn.Parameter) -> tuple[int, ...]:
    return (2,) * parameter.dim()


def _state_after_a_step(optimizer: Optimizer, saved: Saved) -> dict[str, Any] | None:
    """Returns the state of a small parameter after one step with the saved options; None where nobody can tell."""
    if not _is_torch_optim(optimizer):
        return None
    small = nn.Parameter(torch.zeros(_small(saved.parameter), dtype=saved.parameter.dtype, device="cpu"))
    small.grad = torch.ones_like(small)
    options = {name: saved.group[name] for name in _arguments(optimizer) & saved.group.keys()}
    options |= {flag: False for flag in _FLAGS_OF_DEVICES if flag in options}
    try:
        twin = type(optimizer)([small], **options)
        with torch.no_grad():
            inspect.unwrap(type(twin).step)(twin)  # without the hooks of all optimizers
    except Exception:  # it needs a closure, sparse gradients, a matrix
        return None
    return dict(twin.state[small])
