"""The optimizers of one manager: which of them hold its weights, and how their state follows a topology change.

An optimizer that knows of topologies has a method ``on_topology_change(change)``, which moves its state. Of any other,
and of every wrapper around it, each state tensor shaped like the values is moved here: survivors bit for bit, newcomers
as the optimizer makes a new state. Scalars are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smet_compile.format import TopologyChange
from smet_compile.format.user_warning import warn_user
from smet_compile.ops import Site
from smet_compile.ops.optimizers import FoundOptimizer, attributes, find_optimizers, is_hooks, siblings
from smet_compile.runtime.fresh_state import FreshState
from smet_compile.shards import is_sharded, local

_MAX_DEPTH = 5


class ManagedOptimizers:
    """Finds the optimizers in ``given`` that hold parameters of ``model``.

    For compact weights that they do not hold, other ``ActiveAdamW`` of the same model are taken, where one is given.

    Raises:
        ValueError: a compact weight that no optimizer holds; a state that cannot follow a topology change.
    """

    def __init__(self, given: Any, model: nn.Module, sites: dict[str, Site]) -> None:
        self._given = given
        self._model = model
        self._sites = sites
        self._gone: set[str] = set()
        self.find()

    def find(self) -> None:
        """Searches anew: a group may have been added, and some wrappers make what they wrap in their first steps."""
        in_model = list(self._model.parameters())
        self._note_gone({id(parameter) for parameter in in_model})
        parameters = [*in_model, *(site.values for site in self._sites.values())]
        found = find_optimizers(self._given, parameters)
        found += find_optimizers(siblings(found, self._missing(found).values()), parameters)
        self._check_holds(found)
        self.state = _state_to_move(found, self._sites)
        self.found = found
        self._values = {name: site.values for name, site in self._sites.items()}

    def _note_gone(self, in_model: set[int]) -> None:
        """Notes which weights are in layers that were taken out of the model, and warns of them once."""
        gone = {name for name, site in self._sites.items() if id(site.values) not in in_model}
        if news := sorted(name for name in gone - self._gone if self._sites[name].values.requires_grad):
            warn_user(
                f"TopologyManager: {_shown(news)}: no longer in the model, so its topology stays as it is; make the "
                "manager anew for a model of other layers"
            )
        self._gone = gone

    def is_gone(self, site: Site) -> bool:
        """Tells whether the layer of a weight is no longer in the model."""
        return site.name in self._gone

    @property
    def stepping(self) -> list[FoundOptimizer]:
        """Returns the optimizers whose own step updates a parameter of the model."""
        return [each for each in self.found if each.steps]

    def ages(self, values: nn.Parameter) -> Tensor | None:
        """Returns the ages (N,) of the active blocks, from the optimizer that steps the weight; None if it has none."""
        for each in self.stepping:
            if id(values) in each.steps and hasattr(each.optimizer, "block_ages"):
                ages: Tensor = each.optimizer.block_ages(values)
                return ages
        return None

    def read_state(self, values: nn.Parameter, key: str) -> Tensor | None:
        """Returns the state ``key`` of the optimizer that steps the weight, decoded from 8 bits; None without one."""
        for each in self.stepping:
            if id(values) not in each.steps:
                continue
            if hasattr(each.optimizer, "read_slot"):
                slot: Tensor | None = each.optimizer.read_slot(values, key)
                return slot
            state = each.state_of(values).get(key)
            return state if isinstance(state, Tensor) and state.shape == values.shape else None
        return None

    def check_weights(self) -> None:
        """Raises ValueError where a compact weight is no longer the parameter that an optimizer was made with."""
        for name, site in self._sites.items():
            values = site.values_maybe
            if values is None:
                raise ValueError(
                    f"{name}: the weight was made dense (remove_parametrizations, export_dense, ...) after the manager "
                    "was made; make the optimizer and the manager anew"
                )
            if values is not self._values[name] and values.requires_grad:
                groups = (group for each in self.found for group in each.optimizer.param_groups)
                if not any(p is values for group in groups for p in group["params"]):
                    raise ValueError(
                        f"{name}: the model's weight was replaced (load_state_dict(assign=True), to_empty, ...) after "
                        "the optimizer was made; make the optimizer and the manager anew"
                    )

    def _missing(self, found: list[FoundOptimizer]) -> dict[str, nn.Parameter]:
        """Returns the compact weights that none of the optimizers holds."""
        held_ids = {parameter for each in found for parameter in each.holds}
        return {name: site.values for name, site in self._sites.items() if id(site.values) not in held_ids}

    def _check_holds(self, found: list[FoundOptimizer]) -> None:
        missing = [self._sites[name] for name in self._missing(found)]
        names = [site.name for site in missing if site.values.requires_grad and not self.is_gone(site)]
        if names:
            raise ValueError(
                f"{_shown(names)}: expected the optimizer to hold the compact values, but {type(self._given).__name__} "
                "does not; make the optimizer from model.parameters() after sparsify, and where there are several, "
                "pass all of them in a list"
            )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class WeightState(NamedTuple):
    """Holds a state tensor shaped like the values, and the number that a newly grown weight has in it."""

    tensor: Tensor
    fresh: float


class StateToMove(NamedTuple):
    """Holds what follows a topology change.

    Args:
        states: the state of each weight. topology_aware: the optimizers that move their own.
        aliases: the tensors in the state of each weight that share its memory.
    """

    states: dict[str, list[WeightState]]
    topology_aware: list[Any]
    aliases: dict[str, list[Tensor]]

    def follow(self, site: Site, change: TopologyChange) -> None:
        for alias in self.aliases[site.name] if change.resizes else ():
            alias.data = change.values.data
        for optimizer in self.topology_aware:
            optimizer.on_topology_change(change)
        for state in self.states[site.name]:
            change.remap_(state.tensor)
            if state.fresh != 0:
                local(state.tensor)[~change.survived_here] = state.fresh


def _state_to_move(optimizers: list[FoundOptimizer], sites: dict[str, Site]) -> StateToMove:
    """Finds the state of every compact weight.

    Raises ValueError for an optimizer whose state cannot follow a topology change, by its class and key.
    """
    own = _with_own_state(optimizers)  # what is shown twice, as by Fabric's optimizers, moves once
    topology_aware = [each.optimizer for each in own if _is_topology_aware(each.optimizer)]
    others = [each for each in own if not _is_topology_aware(each.optimizer)]
    fresh = FreshState(optimizers)
    for each in others:
        _check_kinds(each)
    states = {name: list(_weight_states(others, site, fresh)) for name, site in sites.items()}
    kept = (each.state_of(site.values).values() for each in optimizers for site in sites.values())
    known = {_memory(tensor) for tensors in kept for tensor in tensors if isinstance(tensor, Tensor)}
    for each in others:
        _check_attributes(each, sites, known)
    aliases = {name: _aliases(optimizers, site.values) for name, site in sites.items()}
    return StateToMove(states, topology_aware, aliases)


def _aliases(optimizers: list[FoundOptimizer], values: nn.Parameter) -> list[Tensor]:
    """Returns the tensors that optimizers keep for a weight and that are its memory, as SAM's copy may become."""
    kept = (tensor for each in optimizers for tensor in each.state_of(values).values())
    return [tensor for tensor in kept if isinstance(tensor, Tensor) and _memory(tensor) == _memory(values)]


def _is_topology_aware(optimizer: Any) -> bool:
    """Returns whether the class has the method itself: a wrapper may answer with that of the optimizer in it."""
    method = getattr(optimizer, "on_topology_change", None)
    return method is not None and getattr(method, "__self__", optimizer) is optimizer


def _with_own_state(optimizers: list[FoundOptimizer]) -> list[FoundOptimizer]:
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
            if not (isinstance(each, Tensor) or _is_scalar(each)):
                raise ValueError(
                    f"{found.name} keeps a state {key!r} of type {type(each).__name__}, expected tensors like the "
                    "parameters or scalars; use an elementwise one (ActiveAdamW, AdamW, SGD, ...)"
                )


def _weight_states(optimizers: list[FoundOptimizer], site: Site, fresh: FreshState) -> Iterator[WeightState]:
    """Leaves out what shares its memory with the values: SAM makes its copy of the weight the weight."""
    values = site.values
    seen = {_memory(tensor) for tensor in (values, values.grad) if tensor is not None}
    for each in optimizers:
        for key, state in each.state_of(values).items():
            if _is_scalar(state) or _memory(state) in seen or state.numel() == 1 != values.numel():
                continue
            seen.add(_memory(state))
            if type(state) not in (Tensor, nn.Parameter) and not is_sharded(state):
                raise ValueError(
                    f"{site.name}: {each.name} keeps a state {key!r} of type {type(state).__name__}, expected a plain "
                    "tensor, whose rows can be moved; for 8-bit state take an active optimizer, as "
                    'ActiveAdamW(model, moment_dtype="int8")'
                )
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
            yield WeightState(state, number)


def _is_scalar(state: Any) -> bool:
    """Returns whether a state is a step count or the like, the same for all weights."""
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
    here: Tensor = local(tensor)
    if here.is_meta or here.layout != torch.strided or not here.numel():
        return id(tensor)
    return here.data_ptr()


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
