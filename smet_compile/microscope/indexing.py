"""Rules for ops that read or write at places which only the data know: along an indexed dimension it may be any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from smet_compile.microscope.capture import Call, Ref
from smet_compile.microscope.reading import Reading
from smet_compile.microscope.units import Units, Value, Weight, combine, gather, pooled, settled, single


def index(reading: Reading, call: Call) -> Value:
    """Entries at places that only the data know: along the indexed dimensions it may be any."""
    value, indices = reading.value(call.args[0]), call.args[1]
    given = _indexed(indices)
    if isinstance(value, Weight):
        alone = list(given) == [0] and value.rows.dim() == 3 and not value.chosen
        return _chosen(value, given[0].shape) if alone and given[0].dtype != torch.bool else reading.opaque(call)
    value = gather(reading.flow, value, list(given))
    chosen: list[Any] = [slice(None)] * value.labels.dim()
    count = call.outputs[0].shape[min(given)] if given else 0
    for dim, ref in given.items():
        boolean = ref.dtype == torch.bool
        chosen[dim] = torch.zeros((count,) if boolean else ref.shape, dtype=torch.int64)
    labels = value.labels[tuple(chosen)]
    return Units(value.node, settled(labels)) if labels.shape == call.outputs[0].shape else reading.opaque(call)


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
    value, out = reading.units(call.args[0]), call.outputs[0].shape
    if not value.labels.dim():
        return value
    dim = call.args[1] % value.labels.dim()
    labels = gather(reading.flow, value, (dim,))
    cut = labels.labels
    for other, size in enumerate(out):
        cut = cut if other == dim else cut.narrow(other, 0, size)
    return Units(labels.node, cut.expand(out))


def write(reading: Reading, call: Call) -> Value:
    """``index_add``, ``scatter`` and the like: what was there, and anything of what is written along one dimension."""
    target = reading.units(call.args[0])
    source = reading.units(call.args[3]) if len(call.args) > 3 else single(reading.flow.CONSTANT, ())
    out = call.outputs[0].shape
    if source.labels.dim() == len(out) and len(out):
        dim = call.args[1] % len(out)
        if all(a == b or d == dim for d, (a, b) in enumerate(zip(source.labels.shape, out, strict=True))):
            return combine(reading.flow, "sum", [target, gather(reading.flow, source, (dim,))], out)
    return combine(reading.flow, "sum", [target, pooled(reading.flow, [source], ())], out)


def index_put(reading: Reading, call: Call) -> Value:
    """What was there, and what is written: its last dimensions lie where they lie in the target."""
    target, source, out = reading.units(call.args[0]), reading.units(call.args[2]), call.outputs[0].shape
    given = _indexed(call.args[1])
    left = len(out) - 1 - max(given)
    spread = source.labels.dim() - left
    if sorted(given) == list(range(len(given))) and spread >= 0:
        source = gather(reading.flow, source, range(spread))
        labels = source.labels[(0,) * spread] if spread else source.labels
        return combine(reading.flow, "sum", [target, Units(source.node, labels)], out)
    return combine(reading.flow, "sum", [target, pooled(reading.flow, [source], ())], out)


def copy(reading: Reading, call: Call) -> Value:
    """``target.copy_(source)``."""
    source = reading.units(call.args[1])
    return Units(source.node, source.labels.expand(call.outputs[0].shape))
