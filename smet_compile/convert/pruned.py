"""Takes the masks that ``torch.nn.utils.prune`` keeps in a model, and ends that reparametrization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from smet_compile.ops.sites import compact_names

_HOOKS = "_forward_pre_hooks"
_PARTS = ("_parameters", "_buffers", _HOOKS)


@contextmanager
def without_pruning(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Ends the pruning of every weight of two or more dimensions, as ``prune.remove`` does; yields their masks.

    A weight of which nothing is pruned has no mask. Where the body fails, the model is as it was, but for the modules
    with a weight that the body has made compact: these stay without the reparametrization, and compute the same.

    Raises ValueError for a model without such a weight.
    """
    pruned = [(name, module) for name, module in model.named_modules() if any(_pruned_names(module))]
    if not pruned:
        raise ValueError(
            'masks: expected weights pruned by torch.nn.utils.prune for masks="prune", found none; pass a dict of '
            'masks, or select="nonzero" for zeros in plain weights'
        )
    before = [_PrunedModule(module) for _, module in pruned]
    try:
        found = {}
        for prefix, module in pruned:
            for name in list(_pruned_names(module)):
                found[f"{prefix}.{name}" if prefix else name] = module._buffers[f"{name}_mask"]
                prune.remove(module, name)
        yield _with_zeros(found)
    except BaseException:
        for each in before:
            each.restore()
        raise


def _with_zeros(masks: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the masks that prune something. Raises ValueError where none does."""
    found = {name: mask for name, mask in masks.items() if not bool((mask == 1).all())}
    if not found:
        raise ValueError(f"masks: expected masks with zeros, got none in the pruned weights {', '.join(masks)}")
    return found


def _pruned_names(module: nn.Module) -> Iterator[str]:
    """Yields the names of the weights of two or more dimensions that are pruned in ``module`` itself."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            original = module._parameters.get(f"{hook._tensor_name}_orig")
            if original is not None and original.dim() >= 2:
                yield hook._tensor_name


class _PrunedModule:
    """Remembers a module as it is before its pruning ends."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compact = set(compact_names(module))
        self._names = list(_pruned_names(module))
        self._parts = {part: dict(getattr(module, part)) for part in _PARTS}
        self._data = {name: self._parts["_parameters"][f"{name}_orig"].data for name in self._names}
        self._computed = {name: module.__dict__[name] for name in self._names if name in module.__dict__}

    @torch.no_grad()
    def restore(self) -> None:
        if set(compact_names(self._module)) != self._compact:
            return
        for part, entries in self._parts.items():
            current = getattr(self._module, part)
            if part == _HOOKS:
                entries = entries | current  # with those of a model in which other modules stay compact
            current.clear()
            current.update(entries)
        for name, data in self._data.items():
            self._parts["_parameters"][f"{name}_orig"].data = data
        self._module.__dict__.update(self._computed)
