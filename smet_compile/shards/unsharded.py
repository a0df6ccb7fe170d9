"""Tells models with shards from others, and describes modules as they were before they were cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from smet_compile.shards.rows import is_sharded

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
