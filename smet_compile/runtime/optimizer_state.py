"""Moves an optimizer's state along with a topology change, whatever elementwise optimizer it is.

An optimizer that knows of topologies says so by a method ``on_topology_change(change)``. Of any other, every
state tensor shaped like the values is moved, survivors bit for bit, newcomers zero; scalars are left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from smet_compile.format import TopologyChange
from smet_compile.ops import Site


def knows_topologies(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, "on_topology_change")


def check_holds(optimizer: Optimizer, sites: dict[str, Site]) -> None:
    """Raises ValueError for a compact weight that the optimizer does not train."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, site in sites.items():
        if id(site.values) not in held and site.values.requires_grad:
            raise ValueError(
                f"{name}: expected {type(optimizer).__name__} to hold its compact values, but it does not; make "
                "the optimizer from model.parameters() after sparsify"
            )


def check_elementwise(optimizer: Optimizer, sites: dict[str, Site]) -> None:
    """Raises ValueError for an optimizer whose state cannot follow a topology change."""
    if knows_topologies(optimizer):
        return
    for states in optimizer.state.values():
        for key, state in states.items():
            if not (isinstance(state, Tensor) or _is_shared(state)):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a state {key!r} of type {type(state).__name__}, expected "
                    "tensors like the parameters or scalars; use an elementwise one (ActiveAdamW, AdamW, SGD, ...)"
                )
    for site in sites.values():
        _check_states(optimizer, site)


def _check_states(optimizer: Optimizer, site: Site) -> None:
    for key, state in optimizer.state.get(site.values, {}).items():
        if _is_shared(state) or _per_weight(state, site):
            continue
        got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"{site.name}: {type(optimizer).__name__} keeps a state {key!r} of shape {got}, expected "
            f"{tuple(site.values.shape)} like the values or a scalar; use an elementwise optimizer (ActiveAdamW, "
            "AdamW, SGD, ...)"
        )


def _per_weight(state: Any, site: Site) -> bool:
    return isinstance(state, Tensor) and state.shape == site.values.shape


def _is_shared(state: Any) -> bool:
    """A step count or the like, the same for all weights."""
    if isinstance(state, Tensor):
        return state.dim() == 0
    return state is None or isinstance(state, int | float | bool)


def follow(optimizer: Optimizer, site: Site, change: TopologyChange) -> None:
    """Moves the state of one site; ``check_elementwise`` has passed."""
    if knows_topologies(optimizer):
        optimizer.on_topology_change(change)  # type: ignore[attr-defined]
        return
    for state in optimizer.state.get(site.values, {}).values():
        if _per_weight(state, site):
            change.remap_(state)
