"""Takes the state out of a run, and gives it to the model, the optimizer and the manager of another layout.

Tensors that lie as a parameter does are moved from rank to rank. What every rank has whole goes into a ``Note``, which
all ranks are told: topologies, counts, settings, the manager's history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.distributed.layout import TensorNote, buffer_name, describe_model, plain_buffers
from smet_compile.distributed.run import Run, data_rank
from smet_compile.distributed.space import Item
from smet_compile.distributed.streams import Stream
from smet_compile.ops import canonical_name, find_sites
from smet_compile.ops.sites import holders_of
from smet_compile.runtime import managers_left_out
from smet_compile.shards import Rows, is_sharded, local, reshard, unwrap

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
    groups: list[dict[str, Any]]
    manager: dict[str, Any] | None
    tied: dict[str, str]
    """Maps each buffer that is another one, too, to the first of its names."""

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
        released: the names of tensors whose memory is free again.
    """

    note: Note | None = None
    stored: dict[str, Tensor] = field(default_factory=dict)
    stream: Stream | None = None
    share: int | None = None
    released: list[str] = field(default_factory=list)
    _num_users: Counter[int] = field(init=False)

    def __post_init__(self) -> None:
        self._num_users = Counter(tensor.untyped_storage().data_ptr() for tensor in self.stored.values())

    @classmethod
    def of(cls, run: Run | None, rank: int) -> Taken:
        """Takes the state of a run, which stays as it is; every rank that has a part of it calls."""
        if run is None:
            return cls()
        note = _note_of(run)
        stream = Stream.of(run.others, run.mesh.device_type)
        return cls(note, _stored(run), stream, data_rank(run.mesh, rank)[0])

    def renumbered(self, numbers: Mapping[int, int]) -> Taken:
        """Returns it for other numbers of ranks."""
        return replace(self, note=None if self.note is None else self.note.renumbered(numbers))

    def release(self, name: str) -> None:
        """Frees the memory of a tensor, wherever it is still known, once no other one that lies in it is to be sent."""
        self.released.append(name)
        memory = self.stored.pop(name).untyped_storage()
        self._num_users[memory.data_ptr()] -= 1
        if not self._num_users[memory.data_ptr()]:
            memory.resize_(0)


def _note_of(run: Run) -> Note:
    reshard(run.model)
    model = run.model
    notes = describe_model(model, run.mesh)
    bits = {name: site.bits_of_whole(site.compact.topology).cpu() for name, site in find_sites(model).items()}
    names = {id(parameter): canonical_name(model, name) for name, parameter in model.named_parameters()}
    small: dict[str, dict[str, Any]] = {}
    for optimizer in run.optimizers:
        with managers_left_out():
            saved = optimizer.state_dict()
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        for parameter, number in zip(_parameters_of(optimizer), numbers, strict=True):
            name, state = names[id(parameter)], saved["state"].get(number, {})
            rows = {key: value for key, value in state.items() if _has_rows(key, value, parameter)}
            notes[name].state.update({key: (tuple(value.shape), value.dtype) for key, value in rows.items()})
            small[name] = {key: Small.of(value, parameter) for key, value in state.items() if key not in rows}
    groups = [
        {key: [names[id(p)] for p in value] if key == "params" else value for key, value in group.items()}
        for optimizer in run.optimizers
        for group in optimizer.param_groups
    ]
    manager = None if run.manager is None else run.manager.state_dict()
    return Note(notes, bits, small, groups, manager, _tied_buffers(model))


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


def fill_model(model: nn.Module, note: Note, arrived: dict[str, Tensor]) -> None:
    """Gives a model on the meta device its parameters, buffers and topologies."""
    holders = holders_of(model)
    for name, parameter in list(model.named_parameters()):
        _, rewrap = unwrap(parameter.detach())
        here = arrived.pop(canonical_name(model, name))
        shaped = rewrap(here) if is_sharded(parameter) else here.view(parameter.shape)
        filled = nn.Parameter(shaped, parameter.requires_grad)
        for module, leaf in holders[parameter]:
            module._parameters[leaf] = filled
    buffers: dict[str, Tensor] = {}
    for name, (module, leaf), buffer in list(plain_buffers(model)):
        here = arrived.pop(buffer_name(name)).view(buffer.shape)
        module._buffers[leaf] = buffers[name] = buffers[note.tied[name]] if name in note.tied else here
    for name, site in find_sites(model).items():
        bits = note.bits[name] if site.part is None else site.part.bits_here(note.bits[name])
        site.compact.topology = bits.to(site.values.device)


def fill_optimizers(run: Run, note: Note, arrived: dict[str, Tensor]) -> None:
    """Gives new optimizers the state of the run, and the options of its groups."""
    names = {id(parameter): canonical_name(run.model, name) for name, parameter in run.model.named_parameters()}
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    own = [[names[id(p)] for p in group["params"]] for group in groups]
    if own != [saved["params"] for saved in note.groups]:
        raise ValueError("optimize: expected the parameter groups of the run, got others; make them alike")
    for group, saved in zip(groups, note.groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    for optimizer in run.optimizers:
        for parameter in _parameters_of(optimizer):
            name, rows = names[id(parameter)], Rows.of(parameter)
            state = {key: each.on(parameter.device) for key, each in note.small[name].items()}
            if not rows.are_first and "num_skipped" in state:  # the first rank's count is that of all
                state["num_skipped"].zero_()
            for key in note.tensors[name].state:
                state[key] = rows.wrap(parameter, arrived.pop(f"{name}/{key}"))
            if state:
                optimizer.state[parameter] = state


def _parameters_of(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]
