"""Puts model, optimizer, manager and random states back where loading them fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import find_sites
from smet_compile.runtime.manager import TopologyManager
from smet_compile.runtime.random_states import random_states, restore_random_states
from smet_compile.runtime.tree import as_bytes


@contextmanager
def all_or_nothing(model: nn.Module, optimizers: list[Any], manager: TopologyManager | None) -> Iterator[None]:
    """If the block raises, everything that it changed is as before, in the same tensors.

    The model's tensors are copied to the CPU meanwhile, since loading writes into them. Of the optimizers, references
    are enough: loading replaces what it holds.
    """
    tensors = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _tensors_of(model)]
    extra = [(module, copy.deepcopy(module.get_extra_state())) for module in model.modules() if _has_extra(module)]
    of_optimizers = (entries for optimizer in optimizers for entries in _optimizer_dicts(optimizer))
    references = [*_compact_dicts(model), *of_optimizers, *_manager_dicts(manager)]
    before = [dict(entries) for entries in references]
    random = random_states()
    try:
        yield
    except BaseException:
        for entries, content in zip(references, before, strict=True):
            entries.clear()
            entries.update(content)
        _restore(tensors)
        for module, state in extra:
            module.set_extra_state(state)
        restore_random_states(random)
        raise


@torch.no_grad()
def _restore(tensors: list[tuple[Tensor, Tensor]]) -> None:
    """Writes only where something changed: not every buffer can be written to."""
    for tensor, before in tensors:
        if as_bytes(tensor.detach().cpu().contiguous()) != as_bytes(before.contiguous()):
            tensor.copy_(before)


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, those of a derived kind too, each once; a meta tensor has nothing to copy."""
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return [tensor for tensor in found.values() if not tensor.is_meta]


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _compact_dicts(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """A compact weight notes which topology its values belong to."""
    for site in find_sites(model).values():
        yield from (site.compact.__dict__, site.compact._buffers)


def _optimizer_dicts(optimizer: Any) -> list[dict[Any, Any]]:
    """Loading puts other dicts in the place of some of these, and changes the others."""
    return [optimizer.__dict__, optimizer.state, *optimizer.state.values(), *optimizer.param_groups]


def _manager_dicts(manager: TopologyManager | None) -> list[dict[Any, Any]]:
    return [] if manager is None else manager.parts_of_state()
