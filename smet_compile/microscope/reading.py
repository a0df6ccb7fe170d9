"""Reads a recorded forward, op by op, into the flow of its units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from smet_compile.format import Layout
from smet_compile.microscope.flow import Flow, Link, Units, Value, Weight, combine, pool, reshape_labels, single
from smet_compile.microscope.recording import Call, Recording, Ref, tree_leaves

Rule = Callable[["Reading", Call], Value | list[Value]]


@dataclass
class Reading:
    """Follows the units through a recorded forward, op by op.

    Args:
        layouts: layout of every matrix by name, sites and dense ones. sites: number of a site's values → its name.
        rules: op → what it does to units; "pointwise" is the rule of elementwise ops that are not named.
        values: what is known of each tensor, by its number.
        unknown: op that no rule knows, through which units are lost → names of weights that it reads.
    """

    layouts: dict[str, Layout]
    sites: dict[int, str]
    rules: dict[str, Rule]
    flow: Flow = field(default_factory=Flow)
    values: dict[int, Value] = field(default_factory=dict)
    unknown: dict[str, set[str]] = field(default_factory=dict)

    def constant(self, shape: tuple[int, ...] = ()) -> Units:
        """Returns what does not depend on the model's input."""
        return single(self.flow.constant, shape)

    def constants(self, refs: Iterable[Ref]) -> list[Value]:
        """Returns a constant in place of each tensor."""
        return [self.constant(ref.shape) for ref in refs]

    def value(self, arg: Any) -> Value:
        """Returns what is known of a tensor or a number. A tensor that the forward never computed is constant."""
        if not isinstance(arg, Ref):
            return single(self.flow.zero if arg == 0 else self.flow.constant, ())
        return self.values.get(arg.number) or self.constant(arg.shape)

    def units(self, arg: Any) -> Units:
        """Returns the units of a tensor or a number. A matrix that multiplies nothing is a constant."""
        value = self.value(arg)
        return value if isinstance(value, Units) else self.constant(arg.shape)

    def sum(self, values: list[Units], shape: tuple[int, ...]) -> Units:
        """Returns the elementwise sum of tensors that broadcast to ``shape``."""
        return combine(self.flow, "sum", values, shape)

    def product(self, values: list[Units], shape: tuple[int, ...]) -> Units:
        """Returns the elementwise product of tensors that broadcast to ``shape``."""
        return combine(self.flow, "product", values, shape)

    def is_site(self, value: Value) -> bool:
        return isinstance(value, Weight) and value.name in self.sites.values()

    def weight(self, name: str) -> Weight:
        """Returns a matrix as it lies in its parameter."""
        layout = self.layouts[name]
        stack, (rows, cols) = layout.num_matrices, layout.matrix
        full = (stack, rows, cols)
        row = torch.arange(stack * rows).view(stack, rows, 1).expand(full)
        col = torch.arange(stack * cols).view(stack, 1, cols).expand(full)
        row, col = (reshape_labels(labels, layout.shape) for labels in (row, col))
        return Weight(name, row, col, stack * rows, stack * cols)

    def opaque(self, call: Call) -> Units:
        """Returns what an unknown op is taken to make: one unit that everything enters."""
        args = [arg for arg in tree_leaves((call.args, call.kwargs)) if isinstance(arg, Ref)]
        values = [self.value(arg) for arg in args]
        result = pool(self.flow, [value for value in values if isinstance(value, Units)], ())
        weights = [value for value in values if isinstance(value, Weight)]
        if weights and result.node == self.flow.constant:  # the tensors that the weights will meet are not seen here
            result = single(self.flow.add("input", 1), ())
        for weight in weights:
            columns = Link(result.node, torch.zeros(weight.num_cols, dtype=torch.int64))
            rows = self.flow.add_matrix(weight.name, columns, weight.num_cols, weight.num_rows)
            result = pool(self.flow, [Units(rows, torch.arange(weight.num_rows))], ())
            self.unknown.setdefault(op_name(call), set()).add(weight.name)
        if result.node != self.flow.constant:
            self.unknown.setdefault(op_name(call), set())
        return result

    def read_call(self, call: Call) -> None:
        """Reads one op: what is known of its outputs, and of what it wrote to."""
        if call.outputs and op_name(call) == "smet.unpack":
            self.values[call.outputs[0].number] = self.weight(self.sites[call.args[0].number])
            return
        before = {ref.number: self.value(ref) for ref in call.aliases}
        results = self._results(call)
        for ref, value in zip(call.outputs, results, strict=True):
            self.values[ref.number] = _with_shape_of(ref, value)
        if call.written:
            self._write(call, before)

    def _results(self, call: Call) -> list[Value]:
        """Returns what is known of each output."""
        if not call.outputs:
            return []
        is_pointwise = torch.Tag.pointwise in call.op.tags
        rule = self.rules.get(short_name(call)) or (self.rules["pointwise"] if is_pointwise else Reading.opaque)
        try:
            results = rule(self, call)
            results = results if isinstance(results, list) else [results] * len(call.outputs)
            _check_shapes(call, results)
        except Exception:  # a use of the op that its rule does not expect: no unit is lost by taking it as unknown
            results = [self.opaque(call)] * len(call.outputs)
        return results

    def _write(self, call: Call, before: dict[int, Value]) -> None:
        """Reads that an op wrote to its arguments.

        What an unknown op wrote to without returning it is made of everything. Other views of the same memory are
        what they were, and anything of what was written.
        """
        for ref in call.written:
            if ref not in call.outputs and short_name(call) not in self.rules:  # a known op writes buffers of a norm
                self.values[ref.number] = _with_shape_of(ref, self.opaque(call))
        written = [self.units(ref) for ref in call.written]
        for alias in call.aliases:
            old = before[alias.number]
            stays = op_name(call) != "aten.copy" and all(new.node == getattr(old, "node", None) for new in written)
            if isinstance(old, Units) and not stays:
                self.values[alias.number] = self.sum([old, pool(self.flow, written, ())], alias.shape)


def op_name(call: Call) -> str:
    """Returns a name such as "aten.add", for ``add_`` too."""
    name = str(call.op.overloadpacket)
    return name[:-1] if name.endswith("_") and call.op._schema.is_mutable else name


def short_name(call: Call) -> str:
    return op_name(call).removeprefix("aten.")


def named_arguments(call: Call) -> dict[str, Any]:
    """Returns the arguments that a call was given, by place or by name, under their names in the op's schema."""
    names = [argument.name for argument in call.op._schema.arguments]
    return call.kwargs | dict(zip(names, call.args, strict=False))


def _with_shape_of(ref: Ref, value: Value) -> Value:
    if isinstance(value, Weight):
        return value
    if value.labels.numel() == 1:
        return Units(value.node, value.labels.reshape(()).expand(ref.shape))
    return Units(value.node, reshape_labels(value.labels, ref.shape))


def _check_shapes(call: Call, results: list[Value]) -> None:
    """Raises where a rule came to other shapes than the op."""
    for ref, value in zip(call.outputs, results, strict=True):
        labels = value.rows if isinstance(value, Weight) else value.labels
        if isinstance(value, Weight) and value.chosen:
            labels = labels[0]
        assert labels.numel() == 1 or prod(labels.shape) == prod(ref.shape), (labels.shape, ref.shape)


def read_forward(
    recording: Recording, layouts: dict[str, Layout], sites: dict[str, str], rules: dict[str, Rule]
) -> Reading:
    """Reads the flow of a recorded forward.

    Args:
        layouts: of matrices by name. sites: name of the parameter that holds a site's values → the site's name.
    """
    reading = Reading(layouts, {recording.state[values].number: name for values, name in sites.items()}, rules)
    for name in layouts.keys() & recording.state.keys():
        reading.values[recording.state[name].number] = reading.weight(name)
    for ref in recording.inputs:
        reading.values[ref.number] = _input(reading.flow, ref)
    for call in recording.calls:
        reading.read_call(call)
    outputs = pool(reading.flow, [reading.units(ref) for ref in recording.outputs], ())
    reading.flow.output = outputs.node
    return reading


def _input(flow: Flow, ref: Ref) -> Units:
    """Returns the units of an input of the model.

    Whole numbers and truth values are looked up or choose, so all of them are one unit. Else units lie along the last
    dimension, or, with four dimensions or more (images), along all but the first.
    """
    if not ref.dtype.is_floating_point or not ref.shape:
        return single(flow.add("input", 1), ref.shape)
    units = ref.shape[1:] if len(ref.shape) > 3 else ref.shape[-1:]
    labels = torch.arange(prod(units)).view(units).expand(ref.shape)
    return Units(flow.add("input", prod(units)), labels)
