"""Reads a recorded forward, op by op, into the flow of its units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from smet_compile.format import Layout
from smet_compile.microscope.capture import Capture
from smet_compile.microscope.combine import combine, pooled
from smet_compile.microscope.flow import Flow, Link
from smet_compile.microscope.recorder import Call, Ref
from smet_compile.microscope.units import Units, Value, Weight, reshaped, single

Rule = Callable[["Reading", Call], Value | list[Value]]


@dataclass
class Reading:
    """A forward that is being read.

    Args:
        weights: layout of every matrix by name, sites and dense ones. sites: number of a site's values → its name.
        rules: op → what it does to units. values: what is known of each tensor, by its number.
        unknown: names of ops that no rule knows, through which units are lost; of weights read in no known way.
    """

    weights: dict[str, Layout]
    sites: dict[int, str]
    rules: dict[str, Rule]
    flow: Flow = field(default_factory=Flow)
    values: dict[int, Value] = field(default_factory=dict)
    unknown: dict[str, set[str]] = field(default_factory=dict)

    def value(self, arg: Any) -> Value:
        """Of a tensor or a number; of what was never computed in the forward: a constant."""
        if not isinstance(arg, Ref):
            return single(self.flow.ZERO if arg == 0 else self.flow.CONSTANT, ())
        return self.values.get(arg.number) or single(self.flow.CONSTANT, arg.shape)

    def units(self, arg: Any) -> Units:
        """The same of what multiplies nothing: a matrix added to or scaled by is a constant."""
        value = self.value(arg)
        return value if isinstance(value, Units) else single(self.flow.CONSTANT, arg.shape)

    def is_site(self, value: Value) -> bool:
        return isinstance(value, Weight) and value.name in self.sites.values()

    def weight(self, name: str) -> Weight:
        """The matrix as it lies in its parameter."""
        layout = self.weights[name]
        stack, (rows, cols) = layout.num_matrices, layout.matrix
        full = (stack, rows, cols)
        row = torch.arange(stack * rows).view(stack, rows, 1).expand(full)
        col = torch.arange(stack * cols).view(stack, 1, cols).expand(full)
        return Weight(name, reshaped(row, layout.shape), reshaped(col, layout.shape), stack * rows, stack * cols)

    def opaque(self, call: Call) -> Units:
        """What an op is taken to do that is not known: everything enters everything."""
        args = [arg for arg in tree_leaves((call.args, call.kwargs)) if isinstance(arg, Ref)]
        values = [self.value(arg) for arg in args]
        made = pooled(self.flow, [value for value in values if isinstance(value, Units)], ())
        weights = [value for value in values if isinstance(value, Weight)]
        if weights and made.node == self.flow.CONSTANT:  # what it will meet is not seen here
            made = single(self.flow.add("input", 1), ())
        for weight in weights:
            columns = Link(made.node, torch.zeros(weight.num_cols, dtype=torch.int64))
            rows = self.flow.matrix(weight.name, columns, weight.num_cols, weight.num_rows)
            made = pooled(self.flow, [Units(rows, torch.arange(weight.num_rows))], ())
            self.unknown.setdefault(name_of(call), set()).add(weight.name)
        if made.node != self.flow.CONSTANT:
            self.unknown.setdefault(name_of(call), set())
        return made

    def step(self, call: Call) -> None:
        """Takes in one op."""
        if call.outputs and name_of(call) == "smet.unpack":
            self.values[call.outputs[0].number] = self.weight(self.sites[call.args[0].number])
            return
        before = {ref.number: self.value(ref) for ref in call.aliases}
        made = self._made(call)
        for ref, value in zip(call.outputs, made, strict=True):
            self.values[ref.number] = self._shaped(ref, value)
        if call.written:
            self._write(call, before)

    def _made(self, call: Call) -> list[Value]:
        """Of each output."""
        rule = self.rules.get(short_name(call)) or self.rules["pointwise" if _is_pointwise(call) else "unknown"]
        if not call.outputs:
            return []
        try:
            made = rule(self, call)
            made = made if isinstance(made, list) else [made] * len(call.outputs)
            _check(call, made)
        except Exception:  # a use of the op that its rule does not expect: no unit is lost by taking it as unknown
            made = [self.opaque(call)] * len(call.outputs)
        return made

    def _shaped(self, ref: Ref, value: Value) -> Value:
        if isinstance(value, Weight):
            return value
        if value.labels.numel() == 1:
            return Units(value.node, value.labels.reshape(()).expand(ref.shape))
        return Units(value.node, reshaped(value.labels, ref.shape))

    def _write(self, call: Call, before: dict[int, Value]) -> None:
        """What an unknown op wrote to without returning it is made of everything; other views of the same memory are
        what they were, and anything of what was written."""
        for ref in call.written:
            if ref not in call.outputs and short_name(call) not in self.rules:  # else it is the buffers of a norm
                self.values[ref.number] = self._shaped(ref, self.opaque(call))
        written = [self.units(ref) for ref in call.written]
        for alias in call.aliases:
            old = before[alias.number]
            stays = name_of(call) != "aten.copy" and all(new.node == getattr(old, "node", None) for new in written)
            if isinstance(old, Units) and not stays:
                anything = pooled(self.flow, written, ())
                self.values[alias.number] = combine(self.flow, "sum", [old, anything], alias.shape)


def name_of(call: Call) -> str:
    """Such as "aten.add", of ``add_`` too."""
    name = str(call.op.overloadpacket)
    return name[:-1] if name.endswith("_") and call.op._schema.is_mutable else name


def short_name(call: Call) -> str:
    return name_of(call).removeprefix("aten.")


def _is_pointwise(call: Call) -> bool:
    return torch.Tag.pointwise in call.op.tags


def _check(call: Call, made: list[Value]) -> None:
    """Raises where a rule came to other shapes than the op."""
    for ref, value in zip(call.outputs, made, strict=True):
        labels: Tensor = value.rows if isinstance(value, Weight) else value.labels
        if isinstance(value, Weight) and value.chosen:
            labels = labels[0]
        assert labels.numel() == 1 or prod(labels.shape) == prod(ref.shape), (labels.shape, ref.shape)


def read(captured: Capture, weights: dict[str, Layout], sites: dict[str, str], rules: dict[str, Rule]) -> Reading:
    """The flow of a captured forward.

    Args:
        weights: layouts by name. sites: name of the parameter that holds a site's values → the site's name.
    """
    by_number = {captured.held[held].number: name for held, name in sites.items()}
    reading = Reading(weights, by_number, rules)
    for name in weights.keys() & captured.held.keys():
        reading.values[captured.held[name].number] = reading.weight(name)
    for ref in captured.inputs:
        reading.values[ref.number] = _input(reading.flow, ref)
    for call in captured.calls:
        reading.step(call)
    outputs = pooled(reading.flow, [reading.units(ref) for ref in captured.outputs], ())
    reading.flow.output = outputs.node
    return reading


def _input(flow: Flow, ref: Ref) -> Units:
    """Units of an input: none apart of whole numbers and truth values, which are looked up or choose; else its last
    dimension, and of what has four dimensions or more (images) all but the first."""
    if not ref.dtype.is_floating_point or not ref.shape:
        return single(flow.add("input", 1), ref.shape)
    units = ref.shape[1:] if len(ref.shape) > 3 else ref.shape[-1:]
    labels: Tensor = torch.arange(prod(units)).view(units).expand(ref.shape)
    return Units(flow.add("input", prod(units)), labels)
