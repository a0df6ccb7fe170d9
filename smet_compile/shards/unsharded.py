"""Tells models with shards from others, and describes modules as they were before they were cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smet_compile.shards.rows import is_fully_sharded, is_fully_sharded_itself, is_sharded

_ADDING = "torch.distributed.fsdp", "torch.distributed.tensor"
"""Modules of torch whose functions add hooks and classes to the modules of a model."""
_NOTES = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_STATE = "__composable_api_state_key"
_COMPILED = "_compiled_call_impl"


def has_shards(model: nn.Module) -> bool:
    """Tells whether a parameter of ``model`` is sharded; one that FSDP2 has gathered for a forward pass is not."""
    return any(is_sharded(parameter) for parameter in model.parameters())


@dataclass(frozen=True)
class Unsharded:
    """Describes a module without what ``fully_shard`` and ``parallelize_module`` added: its class and attributes."""

    kind: type[nn.Module]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Unsharded | None:
        """Describes ``module``; None where it has neither a class nor a hook of these, and can be copied as it is."""
        kind = next(each for each in type(module).__mro__ if not _is_added(each))
        hooks = {k: v for k, v in vars(module).items() if k.startswith("_") and "_hooks" in k and isinstance(v, dict)}
        added = {number for each in hooks.values() for number, hook in each.items() if _is_added(hook)}
        if kind is type(module) and not added:
            return None
        own = {k: v for k, v in vars(module).items() if k != _COMPILED and not k.startswith(_STATE)}
        for name, each in hooks.items():
            own[name] = type(each)((number, hook) for number, hook in each.items() if number not in added)
        return cls(kind, own)


def forget_shards(module: nn.Module) -> None:
    """Removes the notes that ``fully_shard`` leaves at every module, from a copy of one."""
    for name in _NOTES:
        module.__dict__.pop(name, None)


def _is_added(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith(_ADDING)


def check_dtypes(model: nn.Module) -> None:
    """Raises ValueError where parameters of two dtypes share a group of FSDP2, whose gradients have one dtype."""
    if not is_fully_sharded(model):
        return
    found: dict[int, tuple[str, torch.dtype]] = {}
    groups = _groups_of_modules(model, id(model))
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or not is_sharded(parameter):
                continue
            full_name = f"{prefix}.{name}" if prefix else name
            first, dtype = found.setdefault(groups[id(module)], (full_name, parameter.dtype))
            if parameter.dtype != dtype:
                raise ValueError(
                    f"{full_name}: expected {dtype} like {first}, with which fully_shard put it into one group, got "
                    f"{parameter.dtype}; call fully_shard on the modules of one dtype by themselves, or convert them"
                )


def _groups_of_modules(module: nn.Module, group: int) -> dict[int, int]:
    """Returns for each module, by its id, the id of the innermost one around it that was given to ``fully_shard``."""
    group = id(module) if is_fully_sharded_itself(module) else group
    found = {id(module): group}
    for child in module.children():
        found |= _groups_of_modules(child, group)
    return found
