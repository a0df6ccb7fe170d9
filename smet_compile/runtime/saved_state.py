"""The model's and the optimizers' parts of a checkpoint: what is saved of them, and checks before it is loaded.

A file has the canonical names of weights, memory those of this model. An optimizer that has a method
``check_state_dict`` checks its own state. One of ``torch.optim`` is asked what state it would make: it steps on small
parameters that stand for the real ones. The state of any other is compared with its present state.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.ops import CompactWeight, canonical_name, find_sites, loading
from smet_compile.ops.loaded import Saved, check_alike, check_groups, check_integer, check_keys, kind_of
from smet_compile.runtime.tree import set_versions, versions_of
from smet_compile.shards import cut_like, is_sharded

_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf")
_FLAGS_OF_DEVICES = ("foreach", "fused", "capturable", "differentiable")


def model_entries(model: nn.Module) -> dict[str, Any]:
    """Returns the state dict of ``model`` by canonical names. Raises ValueError where two names become one."""
    entries: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        canonical = canonical_name(model, name)
        if canonical in entries:
            raise ValueError(f"{name}: expected one tensor of the name {canonical}, got two; wrap the model once")
        entries[canonical] = value
    return entries


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """Returns the versions of modules that a state dict carries, by canonical names; a wrapped module wins."""
    metadata = versions_of(model.state_dict()) or {}
    return {canonical_name(model, name): dict(entries) for name, entries in metadata.items()}


def layouts_of(model: nn.Module) -> dict[str, list[Any]]:
    """Returns shape, matrix and block shape of each compact weight, pattern and slabs where it has these."""
    return {name: _layout_of(site.compact) for name, site in find_sites(model).items()}


def _layout_of(compact: CompactWeight) -> list[Any]:
    layout = compact.layout if compact.part is None else compact.part.whole
    sizes = [list(sizes) for sizes in (layout.shape, layout.matrix, layout.block_shape)]
    if layout.slabs is not None:
        return [*sizes, compact.pattern, list(layout.slabs[:2])]
    return sizes if compact.pattern is None else [*sizes, compact.pattern]


def loadable(saved: dict[str, Any], metadata: dict[str, Any] | None, model: nn.Module) -> OrderedDict[str, Any]:
    """Returns a state dict by the names that ``model`` has now, sharded as it is, with the metadata that was saved."""
    ours = model.state_dict()
    state = OrderedDict((name, cut_like(saved[canonical_name(model, name)], like)) for name, like in ours.items())
    if metadata is not None:
        by_name = {name: metadata.get(canonical_name(model, name)) for name in versions_of(ours) or {}}
        set_versions(state, {name: entries for name, entries in by_name.items() if entries is not None})
    return state


def check_model(saved: dict[str, Any], layouts: dict[str, Any], metadata: Any, model: nn.Module) -> None:
    """Raises ValueError where the saved tensors, layouts or versions are not of this model."""
    _check_layouts(layouts, layouts_of(model))
    ours = model_entries(model)
    for name in ours.keys() ^ saved.keys():
        where = "this model" if name in ours else "the checkpoint"
        raise ValueError(f"{name} is only in {where}: the checkpoint is of another model")
    for name, tensor in ours.items():
        alike = type(saved[name]) is type(tensor) or (isinstance(saved[name], Tensor) and isinstance(tensor, Tensor))
        if not alike or kind_of(tensor) != kind_of(saved[name]):
            raise ValueError(
                f"{name}: expected {kind_of(tensor)}, got {kind_of(saved[name])} in the checkpoint; it is of another "
                "model, density or dtype"
            )
    for raw, module in model.named_modules():
        if isinstance(module, CompactWeight):
            name = canonical_name(model, raw)
            weight = loading.name_of(name.removesuffix("0"))
            if misfit := loading.misfit(module, saved.get(f"{name}.topology"), weight):
                raise ValueError(misfit)
    _check_metadata(metadata)


def _check_layouts(layouts: Any, ours: dict[str, list[Any]]) -> None:
    for name, layout in layouts.items():
        if name not in ours:
            raise ValueError(f"{name} is compact in the checkpoint, not in this model; sparsify it alike")
        if not isinstance(layout, list) or len(layout) not in (3, 4, 5):
            raise ValueError(f"{name}: expected a layout of shape, matrix and block shape, got {kind_of(layout)}")
        parts = ("shape", "matrix", "block shape", "pattern", "slabs")
        for part, got, expected in zip_longest(parts, layout, ours[name]):
            if got != expected:
                raise ValueError(
                    f"{name}: expected {part} {expected}, got {got!r:.80} in the checkpoint; sparsify the same model "
                    "with the same block_shape, slabs and pattern"
                )
    for name in ours.keys() - layouts.keys():
        raise ValueError(f"{name} is compact in this model, not in the checkpoint; load it into a dense model")


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise ValueError(f"model_metadata: expected a dict, got {kind_of(metadata)}")
    for name, entries in metadata.items():
        if not isinstance(entries, dict):
            raise ValueError(f"model_metadata[{name!r}]: expected a dict, got {kind_of(entries)}")
        if "version" in entries:
            check_integer(f"model_metadata[{name!r}].version", entries["version"])


def optimizer_entry(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Returns what a checkpoint holds of one optimizer."""
    state = optimizer.state_dict()
    return {
        "class": type(optimizer).__name__,
        "names": _parameter_names(model, optimizer),
        "with_state": _numbers_with_state(state),
        "state": state,
    }


def load_optimizers(optimizers: list[Any], states: list[Any]) -> None:
    """Loads each; those that shared their parameter groups share them afterwards, as a scheduler expects."""
    groups = [optimizer.param_groups for optimizer in optimizers]
    for optimizer, state in reversed(list(zip(optimizers, states, strict=True))):
        optimizer.load_state_dict(_cut(state, optimizer))
    for i, optimizer in enumerate(optimizers):
        same = next((j for j in range(i) if groups[j] is groups[i]), None)
        if same is not None:
            optimizer.param_groups = optimizers[same].param_groups


def _cut(state_dict: Any, optimizer: Any) -> Any:
    """Returns a state dict in which what has a row for each of a parameter's rows is sharded as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(is_sharded(p) for p in parameters):
        return state_dict
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    return state_dict | {
        "state": {
            number: {key: _cut_state(key, value, by_number.get(number)) for key, value in state.items()}
            for number, state in state_dict["state"].items()
        }
    }


def _cut_state(key: str, value: Any, parameter: Any) -> Any:
    has_rows = isinstance(value, Tensor) and is_sharded(parameter)
    has_rows = has_rows and (value.shape == parameter.shape or (key == "generation" and value.dim() == 1))
    return cut_like(value, parameter) if has_rows and key not in ("births", "scales") else value


def check_optimizer(saved: Any, model: nn.Module, optimizer: Optimizer, wrapper: str) -> None:
    """Raises ValueError where ``saved`` is no entry of ``optimizer``.

    Args:
        wrapper: the class of the outermost wrapper, which older versions wrote.
    """
    check_keys("optimizer", saved, ("class", "names", "state"), ("with_state",))
    if saved["class"] not in (type(optimizer).__name__, wrapper):
        raise ValueError(
            f"expected the state of {type(optimizer).__name__}, got that of {saved['class']!r:.80}; resume with the "
            "optimizer that was saved"
        )
    if saved["names"] != _parameter_names(model, optimizer):
        raise ValueError("the checkpoint's optimizer holds other parameters or groups; make it alike")
    state = saved["state"]
    _check_optimizer_state(optimizer, state)
    ours = optimizer.state_dict()
    if _has_usual_parts(ours):
        numbers = [group["params"] for group in ours["param_groups"]]
        if [group["params"] for group in state["param_groups"]] != numbers:
            raise ValueError(f"param_groups: expected the parameters {numbers!r:.80}, got them in another order")
    with_state = saved.get("with_state", _numbers_with_state(state))
    if not isinstance(with_state, list) or {*map(repr, with_state)} != {*map(repr, _numbers_with_state(state))}:
        raise ValueError("expected the optimizer's state of all parameters that were trained, some is missing")


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """Returns the names of the parameters of each group."""
    names = {id(p): canonical_name(model, name) for name, p in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _check_optimizer_state(optimizer: Optimizer, state_dict: Any) -> None:
    """Raises ValueError where ``state_dict`` is not what ``optimizer`` could have saved."""
    if hasattr(optimizer, "check_state_dict"):
        optimizer.check_state_dict(state_dict)
        return
    ours = optimizer.state_dict()
    if not _has_usual_parts(ours):
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


def _has_usual_parts(state_dict: dict[str, Any]) -> bool:
    """Returns whether a state dict is made as ``torch.optim.Optimizer`` makes it; some classes make their own."""
    return isinstance(state_dict.get("state"), dict) and isinstance(state_dict.get("param_groups"), list)


def _numbers_with_state(state_dict: dict[str, Any]) -> list[Hashable]:
    """Returns which parameters have state, so that a file cannot lose some of it unseen."""
    if not _has_usual_parts(state_dict):
        return []
    return [number for number, state in state_dict["state"].items() if state]


def _is_torch_optim(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _options_without_default(optimizer: Optimizer) -> set[str]:
    """Returns the options that a group must have; ``torch`` itself fills in others, which older versions lacked."""
    if not _is_torch_optim(optimizer):
        return set(optimizer.defaults)
    bare: Optimizer = object.__new__(type(optimizer))
    bare.__dict__.update(defaults=dict(optimizer.defaults))
    bare.__setstate__({"state": defaultdict(dict), "param_groups": [{"params": []}]})
    return set(optimizer.defaults) - bare.param_groups[0].keys()


def _check_by_constructor(where: str, optimizer: Optimizer, group: dict[str, Any], ours: dict[str, Any]) -> None:
    """Checks that the constructor takes the options; a class that refuses even its present options is not asked."""
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
    """Returns the options that the constructor takes."""
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
                shapes = _shapes(expected.get(key), _small_shape(saved.parameter), shape)
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
    """Returns the shapes that a state may have; None where the optimizer makes one of a shape of its own."""
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
    """Checks that a scalar is finite, a count or mean of squares not negative. Moments may overflow, as in training."""
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


def _small_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return (2,) * parameter.dim()


def _state_after_a_step(optimizer: Optimizer, saved: Saved) -> dict[str, Any] | None:
    """Returns the state of a small parameter after one step with the saved options; None where that fails."""
    if not _is_torch_optim(optimizer):
        return None
    small = nn.Parameter(torch.zeros(_small_shape(saved.parameter), dtype=saved.parameter.dtype, device="cpu"))
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
