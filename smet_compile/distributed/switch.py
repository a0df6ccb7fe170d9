"""Changes how a live run lies on its ranks, between two steps, in memory and bit for bit.

The state of the run goes straight from the ranks that store it to those that are to store it, in one pass over all
tensors. What every rank needs whole travels by broadcast: topologies, counts, settings, the manager's history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from smet_compile.distributed.layout import (
    TensorNote,
    buffer_name,
    describe_model,
    plain_buffers,
)
from smet_compile.distributed.space import Item, SwitchPlan, plan_switch
from smet_compile.distributed.transfer import Meter, Transfer
from smet_compile.ops import canonical_name, find_sites
from smet_compile.runtime import TopologyManager
from smet_compile.shards import Rows, is_sharded, local, reshard, train_on, unwrap

_WHOLE = ("births", "scales")
"""States that every rank has whole, be they as long as a parameter."""
Build = Callable[[Any], nn.Module]
Optimize = Callable[[nn.Module], tuple[Optimizer, TopologyManager | None]]


@dataclass
class Run:
    """Holds what one rank has of a run: its model, the optimizer and the manager (None in dense training)."""

    model: nn.Module
    optimizer: Optimizer
    manager: TopologyManager | None
    mesh: Any


@dataclass(frozen=True)
class Switched:
    """Holds the outcome of a switch.

    Args:
        run: None on a rank that takes no part in it. plan: what was to be sent. meter: what was counted.
    """

    run: Run | None
    plan: SwitchPlan
    meter: Meter


@torch.no_grad()
def switch(run: Run | None, build: Build, optimize: Optimize, mesh: Any, *, chunk_bytes: int = 1 << 26) -> Switched:
    """Moves a run to the ranks and the layout of ``mesh``. Every rank of the default process group calls it.

    Args:
        run: what this rank has of the run; None where it takes no part yet. It is used up.
        build: makes the model for a mesh, on the meta device: sparsify, parallelize, ``fully_shard``.
        optimize: makes optimizer and manager for such a model, with the settings of the run.
        mesh: the ``DeviceMesh`` of the new layout. chunk_bytes: the most that is sent at a time.

    Raises:
        ValueError: the new model has other parameters than the run; on every rank, and the run is as it was.
    """
    old = _on_first(None if run is None else (lambda: _Note.of(run)), _first_holder(run))
    model = build(mesh) if _takes_part(mesh) else None
    first = int(mesh.mesh.min())
    target = _on_first(None if model is None else (lambda: describe_model(model, mesh)), first)
    _check_alike(old.tensors, target)
    items = _items(old, target)
    plan = plan_switch(items, chunk_bytes)
    stored = {} if run is None else _stored(run)
    device = torch.device(mesh.device_type)
    arrived: dict[str, Tensor] = {}

    def release(name: str) -> None:
        stored.pop(name).untyped_storage().resize_(0)

    transfer = Transfer(items, device, stored.get, release, arrived.__setitem__)
    transfer.run(chunk_bytes)
    if model is None:
        return Switched(None, plan, transfer.meter)
    _fill(model, old, arrived)
    train_on(model, mesh)
    optimizer, manager = optimize(model)
    _fill_optimizer(model, optimizer, old, arrived)
    if manager is not None and old.manager is not None:
        manager.load_state_dict(old.manager)
    torch.set_rng_state(old.random)
    return Switched(Run(model, optimizer, manager, mesh), plan, transfer.meter)


@dataclass(frozen=True)
class _Small:
    """Holds a state that every rank has whole, such as a count, and whether it lies where the parameter does."""

    value: Any
    is_with_parameter: bool

    @classmethod
    def of(cls, value: Any, parameter: Tensor) -> _Small:
        if not isinstance(value, Tensor):
            return cls(value, False)
        return cls(value.detach().cpu(), value.device.type == parameter.device.type)

    def on(self, device: torch.device) -> Any:
        """Returns a copy for a parameter on this device."""
        if not isinstance(self.value, Tensor):
            return self.value
        return self.value.clone().to(device if self.is_with_parameter else "cpu")


@dataclass
class _Note:
    """Tells ranks that have nothing of a run what they need: how it lies, and all that every rank has whole."""

    tensors: dict[str, TensorNote]
    bits: dict[str, Tensor]
    small: dict[str, dict[str, _Small]]
    groups: list[dict[str, Any]]
    manager: dict[str, Any] | None
    random: Tensor

    @classmethod
    def of(cls, run: Run) -> _Note:
        """Describes a run; every rank that has a part of it calls."""
        reshard(run.model)
        model, optimizer = run.model, run.optimizer
        notes = describe_model(model, run.mesh)
        bits = {name: site.bits_of_whole(site.compact.topology).cpu() for name, site in find_sites(model).items()}
        names = {id(parameter): canonical_name(model, name) for name, parameter in model.named_parameters()}
        saved = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        small: dict[str, dict[str, Any]] = {}
        for parameter, number in zip(parameters, numbers, strict=True):
            name, state = names[id(parameter)], saved["state"].get(number, {})
            rows = {key: value for key, value in state.items() if _has_rows(key, value, parameter)}
            notes[name].state.update({key: (tuple(value.shape), value.dtype) for key, value in rows.items()})
            small[name] = {key: _Small.of(value, parameter) for key, value in state.items() if key not in rows}
        groups = [
            {key: [names[id(p)] for p in value] if key == "params" else value for key, value in group.items()}
            for group in optimizer.param_groups
        ]
        manager = None if run.manager is None else run.manager.state_dict()
        return cls(notes, bits, small, groups, manager, torch.get_rng_state())


def _has_rows(key: str, value: Any, parameter: Tensor) -> bool:
    """Tells whether a state has an entry for each row of a parameter, and lies as the parameter does."""
    if key in _WHOLE or not isinstance(value, Tensor) or not value.dim() or not parameter.dim():
        return False
    return value.shape == parameter.shape or (value.dim() == 1 and value.shape[0] == parameter.shape[0])


def _takes_part(mesh: Any) -> bool:
    return bool((mesh.mesh == distributed.get_rank()).any())


def _first_holder(run: Run | None) -> int:
    """Returns the first rank that has a part of the run; every rank calls."""
    device = "cpu" if run is None else run.mesh.device_type
    own = distributed.get_rank() if run is not None else distributed.get_world_size()
    least = torch.tensor(own, device=device if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return int(least)


def _on_first(make: Callable[[], Any] | None, first: int) -> Any:
    """Returns on every rank what ``make`` returns on the first; the others that have it call it too."""
    made = None if make is None else make()
    box = [made if distributed.get_rank() == first else None]
    distributed.broadcast_object_list(box, src=first)
    return box[0]


def _check_alike(old: dict[str, TensorNote], new: dict[str, TensorNote]) -> None:
    for name in old.keys() ^ new.keys():
        where = "the run" if name in old else "the new model"
        raise ValueError(f"{name}: expected the same tensors in both, got one that only {where} has; build it alike")
    for name, note in old.items():
        other = new[name]
        if (note.shape, note.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name}: expected {note.dtype} of shape {note.shape} as in the run, got {other.dtype} of "
                f"{other.shape}; build the model with the same sizes, density, slabs and dtype"
            )
        if (note.parts and note.parts.whole) != (other.parts and other.parts.whole):
            raise ValueError(
                f"{name}: expected the layout {note.parts and note.parts.whole} as in the run, got "
                f"{other.parts and other.parts.whole}; sparsify with the same block_shape and slabs"
            )


def _items(old: _Note, target: dict[str, TensorNote]) -> list[Item]:
    """Returns what moves: parameters, each with its state, and buffers."""
    items = []
    for name, note in old.tensors.items():
        source, goal = note.placed(old.bits), target[name].placed(old.bits)
        items.append(Item(name, note.shape, note.dtype, source, goal))
        items += [Item(f"{name}/{key}", *kind, source, goal) for key, kind in note.state.items()]
    return items


def _stored(run: Run) -> dict[str, Tensor]:
    """Returns what this rank stores of a run, by the names of items."""
    found = {}
    for name, parameter in run.model.named_parameters():
        canonical = canonical_name(run.model, name)
        found[canonical] = local(parameter.detach())
        for key, value in run.optimizer.state.get(parameter, {}).items():
            if _has_rows(key, value, parameter):
                found[f"{canonical}/{key}"] = local(value)
    for name, _, buffer in plain_buffers(run.model):
        found[buffer_name(name)] = buffer
    return found


def _fill(model: nn.Module, old: _Note, arrived: dict[str, Tensor]) -> None:
    """Gives a model on the meta device its parameters, buffers and topologies."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        _, rewrap = unwrap(parameter.detach())
        here = arrived.pop(canonical_name(model, name))
        shaped = rewrap(here) if is_sharded(parameter) else here.view(parameter.shape)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(shaped, parameter.requires_grad)
    for name, (module, leaf), buffer in list(plain_buffers(model)):
        module._buffers[leaf] = arrived.pop(buffer_name(name)).view(buffer.shape)
    for name, site in find_sites(model).items():
        bits = old.bits[name] if site.part is None else site.part.bits_here(old.bits[name])
        site.compact.topology = bits.to(site.values.device)


def _fill_optimizer(model: nn.Module, optimizer: Optimizer, old: _Note, arrived: dict[str, Tensor]) -> None:
    """Gives a new optimizer the state of the run, and the options of its groups."""
    names = {id(parameter): canonical_name(model, name) for name, parameter in model.named_parameters()}
    for group, saved in zip(optimizer.param_groups, old.groups, strict=True):
        if [names[id(p)] for p in group["params"]] != saved["params"]:
            raise ValueError("optimize: expected the parameter groups of the run, got others; make them alike")
        group.update({key: value for key, value in saved.items() if key != "params"})
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        name, rows = names[id(parameter)], Rows.of(parameter)
        state = {key: each.on(parameter.device) for key, each in old.small[name].items()}
        if not rows.are_first and "num_skipped" in state:  # the first rank's count is that of all
            state["num_skipped"].zero_()
        for key in old.tensors[name].state:
            state[key] = rows.wrap(parameter, arrived.pop(f"{name}/{key}"))
        if state:
            optimizer.state[parameter] = state
