"""Rules for ops that read or write at places which only the data know: along an indexed dimension it may be any.

Where all that can be read or written is constant (a table, ones), what follows from the input is the place, and the
path leads through that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from smet_compile.microscope.combine import combine, gather, or_else, pooled
from smet_compile.microscope.flow import Link
from smet_compile.microscope.reading import Reading, short_name
from smet_compile.microscope.recorder import Call, Ref
from smet_compile.microscope.units import Units, Value, Weight, settled, single, varies


def index(reading: Reading, call: Call) -> Value:
    """Entries at places that only the data know: along the indexed dimensions it may be any."""
    value, indices = reading.value(call.args[0]), call.args[1]
    given = _indexed(indices)
    if isinstance(value, Weight):
        alone = list(given) == [0] and given[0].dtype != torch.bool and not value.chosen
        if alone and value.rows.dim() == 3:
            return _chosen(value, given[0].shape)
        return _looked_up(reading, call, value, given[0]) if alone else reading.opaque(call)
    value = gather(reading.flow, value, list(given))
    chosen: list[Any] = [slice(None)] * value.labels.dim()
    count = call.outputs[0].shape[min(given)] if given else 0
    for dim, ref in given.items():
        boolean = ref.dtype == torch.bool
        chosen[dim] = torch.zeros((count,) if boolean else ref.shape, dtype=torch.int64)
    labels = value.labels[tuple(chosen)]
    if labels.shape != call.outputs[0].shape:
        return reading.opaque(call)
    return _at(reading, Units(value.node, settled(labels)), *given.values())


def _at(reading: Reading, made: Units, *places: Ref) -> Units:
    """What was read or written at some places."""
    return or_else(reading.flow, made, pooled(reading.flow, [reading.units(ref) for ref in places], ()))


def embedding(reading: Reading, call: Call) -> Value:
    """``embedding``: rows of a matrix, or of a table that is no parameter."""
    table, place = reading.value(call.args[0]), call.args[1]
    if isinstance(table, Weight):
        return _looked_up(reading, call, table, place)
    rows = gather(reading.flow, table, (0,))
    return _at(reading, Units(rows.node, rows.labels[0].expand(call.outputs[0].shape)), place)


def _looked_up(reading: Reading, call: Call, table: Weight, place: Ref) -> Value:
    """Rows of a matrix: which row depends on the input, what it holds does not."""
    chosen = reading.units(place)
    if table.chosen or table.rows.dim() != 2 or varies(table.rows, 1) or varies(table.cols, 0):
        return reading.opaque(call)
    if chosen.node == reading.flow.CONSTANT:
        return single(reading.flow.CONSTANT, call.outputs[0].shape)
    entry = pooled(reading.flow, [chosen], ())
    link = Link(entry.node, torch.zeros(table.num_rows, dtype=torch.int64))
    columns = reading.flow.matrix(table.name, link, table.num_rows, table.num_cols, transposed=True)
    return Units(columns, table.cols[0].expand(call.outputs[0].shape))


def _chosen(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """Some matrices of a stack (S, R, C), ``shape`` of them."""
    rows, cols = (
        labels[(slice(None), *[None] * len(shape))].expand(-1, *shape, -1, -1) for labels in (weight.rows, weight.cols)
    )
    return replace(weight, rows=rows, cols=cols, chosen=True)


def _indexed(indices: Any) -> dict[int, Ref]:
    """Dimension → what indexes it; a mask of several dimensions indexes all of them."""
    found: dict[int, Ref] = {}
    dim = 0
    for ref in indices:
        covers = len(ref.shape) if ref is not None and ref.dtype == torch.bool else 1
        if ref is not None:
            found |= {dim + i: ref for i in range(covers)}
        dim += covers
    return found


def index_select(reading: Reading, call: Call) -> Value:
    """``index_select``, ``gather``: entries along one dimension, any of them."""
    table = reading.value(call.args[0])
    if isinstance(table, Weight):
        by_rows = short_name(call) == "index_select" and call.args[1] == 0
        return _looked_up(reading, call, table, call.args[2]) if by_rows else reading.opaque(call)
    value, out = reading.units(call.args[0]), call.outputs[0].shape
    if not value.labels.dim():
        return value
    dim = call.args[1] % value.labels.dim()
    labels = gather(reading.flow, value, (dim,))
    cut = labels.labels
    for other, size in enumerate(out):
        cut = cut if other == dim else cut.narrow(other, 0, size)
    return _at(reading, Units(labels.node, cut.expand(out)), call.args[2])


def write(reading: Reading, call: Call) -> Value:
    """``index_add``, ``scatter`` and the like: what was there, and anything of what is written along one dimension."""
    target = reading.units(call.args[0])
    source = reading.units(call.args[3]) if len(call.args) > 3 else single(reading.flow.CONSTANT, ())
    return _at(reading, _with(reading, target, _laid_along(reading, call, source), call), call.args[2])


def _laid_along(reading: Reading, call: Call, source: Units) -> Units:
    out = call.outputs[0].shape
    if source.labels.dim() == len(out) and len(out):
        dim = call.args[1] % len(out)
        if all(a == b or d == dim for d, (a, b) in enumerate(zip(source.labels.shape, out, strict=True))):
            return gather(reading.flow, source, (dim,))
    return pooled(reading.flow, [source], ())


def index_put(reading: Reading, call: Call) -> Value:
    """What was there, and what is written: its last dimensions lie where they lie in the target."""
    target, source, out = reading.units(call.args[0]), reading.units(call.args[2]), call.outputs[0].shape
    given = _indexed(call.args[1])
    left = len(out) - 1 - max(given)
    spread = source.labels.dim() - left
    if sorted(given) == list(range(len(given))) and spread >= 0:
        source = gather(reading.flow, source, range(spread))
        written = Units(source.node, source.labels[(0,) * spread] if spread else source.labels)
    else:
        written = pooled(reading.flow, [source], ())
    return _at(reading, _with(reading, target, written, call), *given.values())


def _with(reading: Reading, target: Units, written: Units, call: Call) -> Units:
    return combine(reading.flow, "sum", [target, written], call.outputs[0].shape)


def copy(reading: Reading, call: Call) -> Value:
    """``target.copy_(source)``."""
    source = reading.units(call.args[1])
    return Units(source.node, source.labels.expand(call.outputs[0].shape))
