"""Takes the state out of a run, for the model, the optimizer and the manager of another layout.

Tensors that lie as a parameter does are moved from rank to rank. What every rank has whole goes into a ``Note``, which
all ranks are told: topologies, counts, settings, the manager's history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.distributed.agreement import first_reason
from smet_compile.distributed.layout import TensorNote, buffer_name, describe_model, plain_buffers
from smet_compile.distributed.modes import Modes
from smet_compile.distributed.run import Run, data_rank
from smet_compile.distributed.space import Item
from smet_compile.distributed.streams import Stream
from smet_compile.ops import canonical_name, find_sites
from smet_compile.ops.torch_insides import warn_once
from smet_compile.runtime import managers_left_out
from smet_compile.shards import local, reshard

_WHOLE = ("births", "scales")
"""States that every rank has whole, be they as long as a parameter."""


@dataclass(frozen=True)
class Small:
    """Holds a state that every rank has whole, such as a count, and whether it lies where the parameter does."""

    value: Any
    is_with_parameter: bool

    @classmethod
    def of(cls, value: Any, parameter: Tensor) -> Small:
        if not isinstance(value, Tensor):
            return cls(value, False)
        return cls(value.detach().cpu(), value.device.type == parameter.device.type)

    def on(self, device: Any) -> Any:
        """Returns a copy for a parameter on this device."""
        if not isinstance(self.value, Tensor):
            return self.value
        return self.value.clone().to(device if self.is_with_parameter else "cpu")


@dataclass(frozen=True)
class Note:
    """Tells ranks that have nothing of a run what they need: how it lies, and all that every rank has whole."""

    tensors: dict[str, TensorNote]
    bits: dict[str, Tensor]
    small: dict[str, dict[str, Small]]
    groups: list[list[dict[str, Any]]]
    manager: dict[str, Any] | None
    tied: dict[str, str]
    """Maps each buffer that is another one, too, to the first of its names."""
    modes: Modes

    def items(self, target: Mapping[str, TensorNote]) -> list[Item]:
        """Returns what moves to a layout: parameters, each with its state, and buffers."""
        found = []
        for name, note in self.tensors.items():
            source, goal = note.placed(self.bits), target[name].placed(self.bits)
            found.append(Item(name, note.shape, note.dtype, source, goal))
            found += [Item(f"{name}/{key}", *kind, source, goal) for key, kind in note.state.items()]
        return found

    def renumbered(self, numbers: Mapping[int, int]) -> Note:
        """Returns it for other numbers of ranks; those that are missing have nothing."""
        tensors = {
            name: replace(note, regions={numbers[rank]: at for rank, at in note.regions.items() if rank in numbers})
            for name, note in self.tensors.items()
        }
        return replace(self, tensors=tensors)


@dataclass
class Taken:
    """Holds the state of a run on one rank.

    Args:
        note: None on a rank without a part of the run. stored: the tensors of this rank, by the names of items.
        stream: of this rank, and ``share``, the share of the data that it read; None without a part of the run.
        others: its further objects with a state, by name.
        refusal: says why the run cannot move; empty where it can.
        released: tensors whose memory may be free again, and the bytes of that memory, by name.
    """

    note: Note | None = None
    stored: dict[str, Tensor] = field(default_factory=dict)
    stream: Stream | None = None
    share: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    released: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    _num_users: Counter[int] = field(init=False)

    def __post_init__(self) -> None:
        self._num_users = Counter(tensor.untyped_storage().data_ptr() for tensor in self.stored.values())

    @classmethod
    def of(cls, run: Run | None) -> Taken:
        """Takes the state of a run, which stays as it is; every rank that has a part of it calls.

        Where it cannot move, all of them get the reason alone.
        """
        if run is None:
            return cls()
        reshard(run.model)
        groups = [run.mesh.get_group(dim) for dim in range(run.mesh.ndim)]
        refusal = first_reason(reason_to_stay(run), groups, run.mesh.device_type)
        if refusal:
            return cls(refusal=refusal)
        _warn_of_gradients(run)
        note = _note_of(run)
        stream = Stream.of(run.others, run.mesh.device_type, _own_gradients(run, note))
        return cls(note, _stored(run), stream, data_rank(run.mesh)[0], run.others)

    def renumbered(self, numbers: Mapping[int, int]) -> Taken:
        """Returns it for other numbers of ranks."""
        return replace(self, note=None if self.note is None else self.note.renumbered(numbers))

    def release(self, name: str) -> None:
        """Frees the memory of a tensor, wherever it is still known, once no other one that lies in it is to be sent."""
        tensor = self.stored.pop(name)
        memory = tensor.untyped_storage()
        self.released[name] = tensor, memory.nbytes()
        self._num_users[memory.data_ptr()] -= 1
        if not self._num_users[memory.data_ptr()]:
            memory.resize_(0)

    def restore(self, name: str, value: Tensor) -> None:
        """Gives a tensor that was released its memory and its content again, wherever it is known."""
        tensor, num_bytes = self.released.pop(name)
        memory = tensor.untyped_storage()
        if memory.nbytes() < num_bytes:
            memory.resize_(num_bytes)
            beside = tensor.new_empty(0, dtype=torch.uint8).set_(memory)
            beside.zero_()  # fully_shard pads a part whose rows are fewer
        tensor.copy_(value.view(tensor.shape))
        self.stored[name] = tensor
        self._num_users[memory.data_ptr()] += 1


def reason_to_stay(run: Run) -> str:
    """Says what of a run between two steps cannot move; empty where all can."""
    names = names_of(run.model)
    for optimizer in run.optimizers:
        for number, group in enumerate(optimizer.param_groups):
            where = f"group {number} of {type(optimizer).__name__}"
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    return (
                        f"{where}: expected parameters of the model, got one of shape {tuple(parameter.shape)} that "
                        "it does not have; keep it in the model, as a parameter of one of its modules"
                    )
    return ""


def _warn_of_gradients(run: Run) -> None:
    """Warns that gradients stay behind, which a loop that begins its steps by ``zero_grad`` does not miss."""
    if any(parameter.grad is not None for optimizer in run.optimizers for parameter in parameters_of(optimizer)):
        warn_once(
            "switch: gradients do not travel to the new layout; where they were accumulated for the next step, switch "
            "after optimizer.step(), and call optimizer.zero_grad() there to hear no more of it"
        )


def _note_of(run: Run) -> Note:
    model = run.model
    notes = describe_model(model, run.mesh)
    bits = {name: site.bits_of_whole(site.compact.topology).cpu() for name, site in find_sites(model).items()}
    names = names_of(model)
    small: dict[str, dict[str, Any]] = {}
    for optimizer in run.optimizers:
        with managers_left_out():
            saved = optimizer.state_dict()
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters_of(optimizer), numbers, strict=True):
            name, state = names[id(parameter)], saved["state"].get(number, {})
            rows = {key: value for key, value in state.items() if _has_rows(key, value, parameter)}
            notes[name].state.update({key: (tuple(value.shape), value.dtype) for key, value in rows.items()})
            small[name] = {key: Small.of(value, parameter) for key, value in state.items() if key not in rows}
    groups = [
        [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        for optimizer in run.optimizers
    ]
    manager = None if run.manager is None else run.manager.state_dict()
    return Note(notes, bits, small, groups, manager, _tied_buffers(model), Modes.of(model))


def _own_gradients(run: Run, note: Note) -> Any:
    """Returns the gradients that a rank has collected from its share of the data alone, as without ``fully_shard``."""
    compacts = [site.compact for site in find_sites(run.model).values()]
    has_own = any(compact.collected is not None and not compact.reduced_over for compact in compacts)
    return note.manager["collected"] if note.manager is not None and has_own else None


def _tied_buffers(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    found = {}
    for name, _, buffer in plain_buffers(model):
        known = first.setdefault(id(buffer), name)
        if known != name:
            found[name] = known
    return found


def _has_rows(key: str, value: Any, parameter: Tensor) -> bool:
    """Tells whether a state has an entry for each row of a parameter, and lies as the parameter does."""
    if key in _WHOLE or not isinstance(value, Tensor) or not value.dim() or not parameter.dim():
        return False
    return value.shape == parameter.shape or (value.dim() == 1 and value.shape[0] == parameter.shape[0])


def _stored(run: Run) -> dict[str, Tensor]:
    """Returns what this rank stores of a run, by the names of items."""
    found = {}
    for name, parameter in run.model.named_parameters():
        canonical = canonical_name(run.model, name)
        found[canonical] = local(parameter.detach())
        for optimizer in run.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if _has_rows(key, value, parameter):
                    found[f"{canonical}/{key}"] = local(value)
    for name, _, buffer in plain_buffers(run.model):
        found[buffer_name(name)] = buffer
    return found


def names_of(model: nn.Module) -> dict[int, str]:
    """Returns the canonical name of each parameter, by its id."""
    return {id(parameter): canonical_name(model, name) for name, parameter in model.named_parameters()}


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """Returns the parameters of all groups of an optimizer, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]
