"""Moves an optimizer's state along with a topology change, whatever elementwise optimizer it is.

An optimizer that knows of topologies says so by a method ``on_topology_change(change)``. Of any other, and of every
wrapper around it, each state tensor shaped like the values is moved: survivors bit for bit, newcomers as the optimizer
makes a new state. Scalars are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smet_compile.format import TopologyChange
from smet_compile.ops import Site
from smet_compile.ops.optimizers import FoundOptimizer, attributes, is_hooks
from smet_compile.runtime.fresh_state import FreshState

_MAX_DEPTH = 5


class Rows(NamedTuple):
    """A state tensor shaped like the values, and what a newly grown weight has in it."""

    tensor: Tensor
    fresh: float


class StateToMove(NamedTuple):
    """Holds what follows a topology change: the state of each weight, and optimizers that move their own."""

    rows: dict[str, list[Rows]]
    told: list[Any]

    def follow(self, site: Site, change: TopologyChange) -> None:
        for optimizer in self.told:
            optimizer.on_topology_change(change)
        for rows in self.rows[site.name]:
            change.remap_(rows.tensor)
            if rows.fresh != 0:
                rows.tensor[~change.survived] = rows.fresh


def state_to_move(optimizers: list[FoundOptimizer], sites: dict[str, Site]) -> StateToMove:
    """Finds the state of every compact weight.

    Raises ValueError for an optimizer whose state cannot follow a topology change, by its class and key.
    """
    told = [each.optimizer for each in optimizers if _knows_topologies(each.optimizer)]
    others = [each for each in _with_state_of_their_own(optimizers) if not _knows_topologies(each.optimizer)]
    fresh = FreshState(optimizers)
    for each in others:
        _check_kinds(each)
    rows = {name: list(_rows(others, site, fresh)) for name, site in sites.items()}
    kept = (each.state_of(site.values).values() for each in optimizers for site in sites.values())
    known = {_memory(tensor) for tensors in kept for tensor in tensors if isinstance(tensor, Tensor)}
    for each in others:
        _check_attributes(each, sites, known)
    return StateToMove(rows, told)


def _knows_topologies(optimizer: Any) -> bool:
    """Returns whether the class has the method itself: a wrapper may answer with that of the optimizer in it."""
    method = getattr(optimizer, "on_topology_change", None)
    return method is not None and getattr(method, "__self__", optimizer) is optimizer


def _with_state_of_their_own(optimizers: list[FoundOptimizer]) -> list[FoundOptimizer]:
    """Leaves out wrappers that show the state of what they wrap."""
    innermost_first, seen = [], set()
    for each in reversed(optimizers):
        state = getattr(each.optimizer, "state", None)
        if state is None or id(state) not in seen:
            innermost_first.append(each)
            seen.add(id(state))
    return innermost_first[::-1]


def _check_kinds(found: FoundOptimizer) -> None:
    state = getattr(found.optimizer, "state", None)
    for states in state.values() if isinstance(state, Mapping) else ():
        for key, each in states.items() if isinstance(states, Mapping) else ():
            if not (isinstance(each, Tensor) or _is_shared(each)):
                raise ValueError(
                    f"{found.name} keeps a state {key!r} of type {type(each).__name__}, expected tensors like the "
                    "parameters or scalars; use an elementwise one (ActiveAdamW, AdamW, SGD, ...)"
                )


def _rows(optimizers: list[FoundOptimizer], site: Site, fresh: FreshState) -> Iterator[Rows]:
    """Leaves out what shares its memory with the values: SAM makes its copy of the weight the weight."""
    values = site.values
    seen = {_memory(tensor) for tensor in (values, values.grad) if tensor is not None}
    for each in optimizers:
        for key, state in each.state_of(values).items():
            if _is_shared(state) or _memory(state) in seen or state.numel() == 1 != values.numel():
                continue
            seen.add(_memory(state))
            if state.shape != values.shape:
                raise ValueError(
                    f"{site.name}: {each.name} keeps a state {key!r} of shape {tuple(state.shape)}, expected "
                    f"{tuple(values.shape)} like the values or a scalar; use an elementwise optimizer (ActiveAdamW, "
                    "AdamW, SGD, ...)"
                )
            number = fresh.of(each.optimizer, values, key)
            if number is None:
                raise ValueError(
                    f"{site.name}: {each.name} keeps a state {key!r} for every weight, and a second "
                    f"{type(each.optimizer).__name__} could not be made to ask what a new weight starts with; give "
                    "the class a method on_topology_change(change) that moves its state, or use another optimizer"
                )
            yield Rows(state, number)


def _is_shared(state: Any) -> bool:
    """A step count or the like, the same for all weights."""
    if isinstance(state, Tensor):
        return state.dim() == 0
    return state is None or isinstance(state, int | float | bool | str)


def _check_attributes(found: FoundOptimizer, sites: dict[str, Site], known: set[int]) -> None:
    """Raises ValueError for a tensor shaped like a compact weight that is kept anywhere but in ``state``."""
    values = [site.values for site in sites.values() if id(site.values) in found.holds]
    shapes = {each.shape for each in values if each.numel() > 1}
    in_use = {_memory(tensor) for each in values for tensor in (each, each.grad) if tensor is not None}
    for name, tensor in _tensors_beside_state(found.optimizer):
        is_like_values = tensor.shape in shapes and tensor.is_floating_point()
        if is_like_values and _memory(tensor) not in known | in_use:
            raise ValueError(
                f"{found.name} keeps a tensor of shape {tuple(tensor.shape)}, that of a compact weight, in {name}, "
                "which cannot follow a topology change; keep it in state[parameter], or give the class a method "
                "on_topology_change(change) that moves it"
            )


def _memory(tensor: Tensor) -> int:
    """Returns where the tensor begins in memory; two with one beginning are changed together."""
    return id(tensor) if tensor.is_meta or tensor.layout != torch.strided else tensor.data_ptr()


def _tensors_beside_state(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in attributes(optimizer):
        if name not in ("state", "param_groups") and not is_hooks(name):
            yield from _tensors(value, name, _MAX_DEPTH)
    for place, group in enumerate(getattr(optimizer, "param_groups", ())):
        rest = {key: value for key, value in group.items() if key != "params"}
        yield from _tensors(rest, f"param_groups[{place}]", _MAX_DEPTH)
    state = getattr(optimizer, "state", None)
    elsewhere = {k: v for k, v in state.items() if not isinstance(k, Tensor)} if isinstance(state, Mapping) else {}
    yield from _tensors(elsewhere, "state", _MAX_DEPTH)


def _tensors(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.ParameterList | nn.ParameterDict):
        yield from ((f"{name}.{key}", parameter) for key, parameter in value.named_parameters())
    elif depth and isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, f"{name}[{key!r}]" if isinstance(key, str | int) else f"{name}[...]", depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for place, each in enumerate(value):
            yield from _tensors(each, f"{name}[{place}]", depth - 1)
