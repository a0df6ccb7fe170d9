"""Describes one optimizer step of one parameter as an ``Update``, and converts it to the arguments of an op and back.

An op of torch takes tensors, numbers and text but no Python object. ``_FIELDS`` lists these arguments once: the schemas
of the ops and of their sinks are made from it, and ``check_names`` compares a kernel's own table of arguments with it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout, Topology
from smet_compile.ops import gate
from smet_compile.ops.law import num_scales
from smet_compile.ops.rules import Rule, find_rule


@dataclass(slots=True, eq=False)
class Update:
    """Holds all that one optimizer step of one parameter needs. The step changes tensors in place where marked (*).

    Args:
        rule: the mathematics of the step.
        values (*), grad: (N,) or (N, bm, bn) for a compact weight, any shape for a plain parameter.
        slots (*): the rule's state, each of the shape of ``values``: fp32, fp64 or bf16, or 8-bit codes in uint8.
        scales (*): (number of slots, num_groups) fp32, the largest magnitude of each group of codes (see ``ops.law``);
            None without codes.
        num_skipped (*): int64 scalar, raised by the number of blocks whose gradient is not finite. Such a block keeps
            its weights and slots, but grows older.
        step (*): int64 scalar, the number of updates before this one; raised by one. lr: scalar tensor.
        generation, births: block i became active after step ``births[generation[i]]``; its age is the new ``step``
            less that. None where blocks have no age.
        topology: where the blocks lie in the dense weight, on which rounding noise and scales depend; None for a plain
            parameter.
        layout: the topology's; for a plain parameter it tells what its rows are, or is None.
        units_are_columns: for a normalized rule, whether an output unit of the weight is a column.
        options: the rule's numbers, in the rule's order.
        density_rate: d^(-p). warmup_steps: W of blocks that were grown; 0 for none.
        initial_warmup_steps: W of the blocks that were there from the start, which are those born at step 0.
        noise_seed: seed for rounding bf16 tensors and codes stochastically; None to round to nearest.
        first_place: the position in the whole parameter of the first entry here, for a plain parameter of which this
            is a shard: consecutive entries. Noise and output units are those of the whole; groups of codes begin here.
        sum_over_ranks: adds a tensor up, in place, over the ranks that hold the other rows of the parameter; for a
            normalized rule, whose output units may lie on several. None where all rows are here.
        prepared: whatever a kernel prepared for this update and may use again while its tensors stay the same.
    """

    rule: Rule
    values: Tensor
    grad: Tensor
    slots: tuple[Tensor, ...]
    scales: Tensor | None
    num_skipped: Tensor
    step: Tensor
    lr: Tensor
    generation: Tensor | None
    births: Tensor | None
    topology: Topology | None
    layout: Layout | None
    units_are_columns: bool
    options: tuple[float, ...]
    density_rate: float
    warmup_steps: int
    initial_warmup_steps: int
    noise_seed: int | None
    first_place: int = 0
    sum_over_ranks: Callable[[Tensor], Any] | None = field(default=None, repr=False)
    prepared: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_coded(self) -> bool:
        return self.scales is not None

    @property
    def rounds_stochastically(self) -> bool:
        """Tells whether any of its tensors is rounded stochastically."""
        low = (torch.bfloat16, torch.uint8)
        return self.noise_seed is not None and any(t.dtype in low for t in (self.values, *self.slots))

    def tensors(self) -> Iterable[Tensor]:
        """Yields every tensor of the update except the learning rate, with the bits and lists of its topology."""
        of_topology = () if self.topology is None else (self.topology.bits, self.topology.lists)
        ages = self.scales, self.num_skipped, self.step, self.generation, self.births
        for tensor in (self.values, self.grad, *self.slots, *ages, *of_topology):
            if tensor is not None:
                yield tensor

    def changed(self) -> list[Tensor]:
        """Returns the tensors that an update changes."""
        scales = () if self.scales is None else (self.scales,)
        return [self.values, *self.slots, *scales, self.num_skipped, self.step]


class Settings(NamedTuple):
    """The names and numbers of an update. They travel through an op as one text: each argument costs compile time."""

    rule: str
    options: tuple[float, ...]
    density_rate: float
    warmup_steps: int
    initial_warmup_steps: int
    noise_seed: int | None
    units_are_columns: bool = False
    layout: str = ""
    first_place: int = 0

    @classmethod
    def from_text(cls, text: str) -> Settings:
        """Reads what ``text`` wrote."""
        return _from_text(text)

    def text(self) -> str:
        """Returns the settings as a JSON list, which holds every number exactly."""
        return json.dumps(self)

    def make_layout(self) -> Layout | None:
        return Layout.from_text(self.layout) if self.layout else None


@functools.lru_cache(maxsize=4096)
def _from_text(text: str) -> Settings:
    rule, options, *others = json.loads(text)
    return Settings(rule, tuple(options), *others)


class _Field(NamedTuple):
    """Describes an argument of the op: its name, its type in a schema, and whether the op changes it."""

    name: str
    type: str
    is_changed: bool = False


_FIELDS = (
    _Field("values", "Tensor", True),
    _Field("grad", "Tensor"),
    _Field("slots", "Tensor[]", True),
    _Field("scales", "Tensor?", True),
    _Field("num_skipped", "Tensor", True),
    _Field("step", "Tensor", True),
    _Field("lr", "Tensor"),
    _Field("generation", "Tensor?"),
    _Field("births", "Tensor?"),
    _Field("topology", "Tensor?"),
    _Field("lists", "Tensor?"),
    _Field("settings", "str"),
)
NAMES = tuple(argument.name for argument in _FIELDS)
_REST = NAMES[2:]
"""The arguments that ``update_``, ``sampled_update_`` and the update sink have in common, besides the values."""


def schema(between: str = "Tensor grad", mutates: bool = True) -> str:
    """Returns the arguments of an op as a schema: the values, ``between`` instead of the gradient, and the others."""
    letters = iter("abcdefghij")
    parts = []
    for argument in _FIELDS:
        kind, brackets = (argument.type[:-2], "[]") if argument.type.endswith("[]") else (argument.type, "")
        optional = "?" if kind.endswith("?") else ""
        alias = f"({next(letters)}!)" if argument.is_changed and mutates else ""
        parts.append(f"{kind.removesuffix('?')}{alias}{optional}{brackets} {argument.name}")
    values, _, *rest = parts
    return ", ".join([values, *([between] if between else []), *rest])


def flatten(update: Update) -> tuple[Any, ...]:
    """Returns the arguments of the op after the gradient."""
    topology = update.topology
    settings = Settings(
        update.rule.name,
        update.options,
        update.density_rate,
        update.warmup_steps,
        update.initial_warmup_steps,
        update.noise_seed,
        update.units_are_columns,
        "" if update.layout is None else update.layout.text,
        update.first_place,
    )
    return (
        list(update.slots),
        update.scales,
        update.num_skipped,
        update.step,
        update.lr,
        update.generation,
        update.births,
        None if topology is None else topology.bits,
        None if topology is None else topology.lists,
        settings.text(),
    )


def unflatten(values: Tensor, grad: Tensor, rest: tuple[Any, ...]) -> Update:
    """Makes the update of the arguments of the op; ``rest`` are those after the gradient.

    Raises:
        ValueError: state, ages or topology do not fit the values.
    """
    named = dict(zip(_REST, rest, strict=True))
    bits, lists, settings = named.pop("topology"), named.pop("lists"), Settings.from_text(named.pop("settings"))
    topology = None
    if bits is not None:
        if lists is None:
            raise ValueError("update_: expected the lists beside the topology, got none; pass CompactWeight.lists")
        topology = gate.find(bits, lists, settings.layout, values.shape[0])
    update = _make(settings, topology, named | {"values": values, "grad": grad})
    check("update_", update)
    return update


def make_traced(named: dict[str, Any]) -> Update:
    """Makes an update of the arguments of the op by name, which only stand for tensors. Nothing is checked."""
    bits, lists, settings = named["topology"], named["lists"], Settings.from_text(named["settings"])
    layout = settings.make_layout()
    topology = None if bits is None or layout is None else Topology(layout, bits, lists, named["values"].shape[0])
    others = {name: named[name] for name in NAMES if name not in ("topology", "lists", "settings")}
    return _make(settings, topology, others)


def _make(settings: Settings, topology: Topology | None, tensors: dict[str, Any]) -> Update:
    return Update(
        rule=find_rule(settings.rule),
        topology=topology,
        layout=topology.layout if topology else settings.make_layout(),
        units_are_columns=settings.units_are_columns,
        options=settings.options,
        density_rate=settings.density_rate,
        warmup_steps=settings.warmup_steps,
        initial_warmup_steps=settings.initial_warmup_steps,
        noise_seed=settings.noise_seed,
        first_place=settings.first_place,
        **(tensors | {"slots": tuple(tensors["slots"])}),
    )


def check(name: str, update: Update) -> None:
    """Raises ValueError where state or ages do not fit the values. ``name`` is the parameter's, for the message."""
    values = update.values
    keys = [slot.name for slot in update.rule.slots]
    if len(keys) != len(update.slots) or len(update.rule.options) != len(update.options):
        raise ValueError(
            f"{name}: expected the slots ({', '.join(keys)}) and the options ({', '.join(update.rule.options)}) of the "
            f"rule {update.rule.name}, got {len(update.slots)} slots and {len(update.options)} options"
        )
    for key, slot in zip(keys, update.slots, strict=True):
        if slot.shape != values.shape or slot.device != values.device:
            raise ValueError(
                f"{name}: expected {key} of shape {tuple(values.shape)} on {values.device}, got {tuple(slot.shape)} on "
                f"{slot.device}; make the optimizer anew, or load its state again"
            )
    for key, count in (("num_skipped", update.num_skipped), ("step", update.step)):
        if count.dtype != torch.int64 or count.numel() != 1:
            raise ValueError(f"{name}: expected {key} as one int64, got {count.dtype} of shape {tuple(count.shape)}")
    scales = update.scales
    if scales is not None:
        layout = None if update.topology is None else update.layout
        shape = len(keys), num_scales(values.numel(), layout)
        if scales.dtype != torch.float32 or tuple(scales.shape) != shape:
            raise ValueError(
                f"{name}: expected scales of float32 and {shape}, got {scales.dtype} of {tuple(scales.shape)}"
            )
    for key in ("num_skipped", "step", "scales", "generation", "births"):
        tensor = getattr(update, key)
        if tensor is not None and tensor.device != values.device:
            raise ValueError(f"{name}: expected {key} on {values.device}, got {tensor.device}; load the state again")
    _check_first_place(name, update)
    if values.dim():
        gate.check_ages(name, update.generation, update.births, values.shape[0])


def _check_first_place(name: str, update: Update) -> None:
    first, layout = update.first_place, update.layout
    if first == 0:
        return
    if update.topology is not None:
        raise ValueError(
            f"{name}: expected first_place of 0 beside a topology, got {first}; restrict the topology to the blocks of "
            "the shard instead"
        )
    if first < 0 or (layout is not None and first + update.values.numel() > layout.num_weights):
        within = "" if layout is None else f" so that {update.values.numel()} entries lie within {layout.shape}"
        raise ValueError(
            f"{name}: expected first_place of at least 0{within}, got {first}; pass the position of the first entry in "
            "the whole parameter, and the layout of the whole"
        )


def check_names(table: str, names: Collection[str], rule: Rule, derived: Collection[str]) -> None:
    """Checks a table that a kernel reads (members of a struct, columns) against the fields of an update.

    Every name has to be a field, a slot or an option of ``rule``, or one of ``derived``, and each field that a kernel
    cannot do without has to be there. Raises ValueError otherwise.
    """
    slots, options = {slot.name for slot in rule.slots}, set(rule.options)
    unknown = set(names) - set(NAMES) - set(Settings._fields) - slots - options - set(derived)
    numbers = {"warmup_steps", "initial_warmup_steps", "first_place"}
    needed = {"values", "grad", "scales", "num_skipped", "step", "generation", "births"} | numbers | slots
    missing = needed - set(names)
    if unknown or missing:
        raise ValueError(f"{table}: unknown names {sorted(unknown)}, missing names {sorted(missing)}")
